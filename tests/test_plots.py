"""Figures: what all of them keep to, and the helpers that they share. What single figures show is tested lab by lab."""

import base64
import html
import re
import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from contrast import faint_texts
from matplotlib import colors

from refusallab import plots
from refusallab.errors import RefusalLabError
from refusallab.geometry import Strip
from refusallab.measure import Difference, Outcome, rate
from refusallab.plots import heatmaps, intervals, schematics, style
from refusallab.steering import Dose

SETS = ("harmful", "harmless", "borderline")
LONG = "a name that is as long as the longest of the course"
SHARE, DIFFERENCE = rate([True, True, False]), Difference(0.1, -0.1, 0.3, 20)
OUTCOMES = [Outcome(False, True), Outcome(False, False), Outcome(True, False), Outcome(True, True)]
DOSES = [Dose(c, SHARE, SHARE, abs(c)) for c in (-1.0, 0.0, 1.0)]


@pytest.fixture(autouse=True)
def in_the_style_of_the_course():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def examples(search):
    """For each function a figure, as much as possible with the numbers of panels, rows and lines that the labs have."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    curve = {0: SHARE, 45: SHARE, 90: SHARE}
    five = ("undefended", "extended refusal", "ReFAT", "rerouting", "knows nothing")
    return {
        "audit_plane": lambda: plots.audit_plane({"taken out": {"a": (1.0, 0.1)}, "refuses": {"b": (0.1, 1.0)}}),
        "breaking_curves": lambda: plots.breaking_curves({name: {0: OUTCOMES, 5: OUTCOMES} for name in five}),
        "cone_figure": lambda: plots.cone_figure({name: {"refused": curve, "exact": curve} for name in "abc"}),
        "cosine_maps": lambda: plots.cosine_maps({"layers, here": (2 * draw(8, 8) - 1, range(8))}),
        "cost_curve": lambda: plots.cost_curve({n: [(0.0, SHARE), (9.0, SHARE)] for n in ("cascade", "one")}, "x", "y"),
        "defence_grid": lambda: plots.defence_grid({name: dict.fromkeys("xyz", OUTCOMES) for name in five}),
        "difference_rows": lambda: plots.difference_rows(
            {"law": dict.fromkeys("abcd", DIFFERENCE)}, "change of a share"
        ),
        "dose_figure": lambda: plots.dose_figure({name: {"r": DOSES, "random": DOSES} for name in SETS[:2]}),
        "dot_rows": lambda: plots.dot_rows({name: draw(5).tolist() for name in SETS}, "share", {"chance": 0.5}),
        "edit_trials": lambda: plots.edit_trials(
            {name: ([(0.1, 2.0), (0.2, -1.0)], {"textbook, layer 3": (0.3, -2.0)}) for name in "ab"}
        ),
        "first_order": lambda: plots.first_order({"random swaps": (draw(5), draw(5)), LONG: (draw(5), draw(5))}),
        "gap_curves": lambda: plots.gap_curves(
            {"exact": dict.fromkeys(("textbook", "full"), draw(9)), "tied": dict.fromkeys((LONG, "full"), draw(9))}
        ),
        "headline_figure": lambda: plots.headline_figure(search, {name: draw(6, 5) for name in SETS}),
        "interval_coverage": lambda: plots.interval_coverage(
            {"Wald": np.array([0.5, 0.9]), "Wilson": np.array([0.9, 0.95])}, np.array([0.1, 0.5]), 54
        ),
        "judged_shares": lambda: plots.judged_shares(
            {"as it is": dict.fromkeys(("paper's", "longer"), SHARE), "prefilled": {"paper's": SHARE}},
            {"as it is": 1.0, "prefilled": 0.0},
        ),
        "layer_curves": lambda: plots.layer_curves(
            {name: dict.fromkeys("abcd", draw(6, 8)) for name in "xy"}, "cosine"
        ),
        "lens_curves": lambda: plots.lens_curves({name: draw(6, 9) for name in (*SETS, "harmless, house closed")}),
        "lens_grid": lambda: plots.lens_grid({"a": ([["I", "Use"]] * 9, draw(9, 2))}, ["-2", "-1"], {"I"}),
        "loss_curves": lambda: plots.loss_curves(
            {"GCG": [[3.0, 2.0]], "random search": [[3.0, 4.0]]}, {"first suffix": 1.0}
        ),
        "matrix_grid": lambda: plots.matrix_grid({"direct": dict.fromkeys(five, SHARE), LONG: {"ReFAT": SHARE}}),
        "metric_histograms": lambda: plots.metric_histograms({name: draw(9) for name in SETS}),
        "null_bypass": lambda: plots.null_bypass(search, [3.0, 3.5], 3.7),
        "outcome_bars": lambda: plots.outcome_bars({name: {"GCG": OUTCOMES, "begin": OUTCOMES} for name in "ab"}),
        "plane_figure": lambda: plots.plane_figure({name: draw(5, 2) for name in SETS}, "x", "y", draw(2)),
        "rate_panels": lambda: plots.rate_panels({name: {"r": {"refused": SHARE, "exact": SHARE}} for name in "abc"}),
        "rate_rows": lambda: plots.rate_rows({"untouched": {"refused": SHARE}, "ablated": {"exact": SHARE}}),
        "recovery_curves": lambda: plots.recovery_curves(
            {name: dict.fromkeys(("other action", "other thing"), [DIFFERENCE] * 8) for name in five}
        ),
        "recovery_grids": lambda: plots.recovery_grids(
            {name: ([f"token {k}" for k in range(9)], 2 * draw(8, 9) - 1) for name in "ab"}, "token"
        ),
        "response_curves": lambda: plots.response_curves({"ACE": dict.fromkeys(SETS[:2], curve)}, "share refused"),
        "roc_curve": lambda: plots.roc_curve({"as they come": draw(4, 2), "under attack": draw(4, 2)}, (0.1, 0.8)),
        "score_plane": lambda: plots.score_plane({"undefended": (SHARE, SHARE), "wall": (rate([False]), rate([True]))}),
        "score_surfaces": lambda: plots.score_surfaces(search),
        "score_traces": lambda: plots.score_traces({n: {"one": draw(9), "two": draw(5)} for n in ("a", "b")}, 0.9),
        "share_grids": lambda: plots.share_grids({"a": draw(8, 5), "b": draw(8, 5)}, range(-5, 0), "share"),
        "stacked_shares": lambda: plots.stacked_shares(
            {"a": {"x": 0.95, "y": 0.05}, "b": {"x": 0.5, "y": 0.5}}, "share"
        ),
        "success_curves": lambda: plots.success_curves({s: {"answered": [SHARE], "exact": [SHARE]} for s in "ab"}),
        "token_strips": lambda: plots.token_strips({n: Strip(("a", "\n"), draw(8, 2) - 0.5) for n in "abc"}),
        "twin_distances": lambda: plots.twin_distances({"one": (list("abcde"), draw(9, 5)), "two": ("a", draw(9, 1))}),
        "write_grids": lambda: plots.write_grids({n: (draw(8, 4) - 0.5, draw(8) - 0.5) for n in "ab"}, "along r"),
        "write_strengths": lambda: plots.write_strengths({n: {"embedding": 1.0, "MLP 0": 0.0} for n in ("a", LONG)}),
    }


NAMES = sorted(set(plots.__all__) - {"schematic", "use_style"})


@pytest.fixture(scope="module", params=NAMES)
def figure(request, made_search):
    """One figure for all tests that look at it: drawing takes time."""
    with plt.rc_context():
        plots.use_style()
        made = examples(made_search(8, 5))[request.param]()
        made.canvas.draw()
    made.pixels = np.array(made.canvas.buffer_rgba())[::-1, :, :3] / 255  # as on the screen, from below
    return made


def drawn(figure):
    """The panels that hold data, without scales of colours."""
    return [axis for axis in figure.axes if axis.get_visible() and axis.get_label() != "<colorbar>"]


def test_every_function_has_an_example(made_search):
    assert sorted(examples(made_search(8, 5))) == NAMES


@pytest.mark.slow
def test_axes_say_what_they_show(figure):
    """Every panel or the figure has a name below, and every row one on the left, unless its ticks are names."""
    panels = drawn(figure)
    for axis in panels:
        row = axis.get_subplotspec().rowspan.start
        below = [a for a in panels if a.get_subplotspec().rowspan.start >= row]
        assert figure.get_supxlabel() or any(a.get_xlabel() for a in below), axis.get_title()
        beside = [a for a in panels if a.get_subplotspec().rowspan.start == row]
        ticks = " ".join(label.get_text() for a in beside for label in a.get_yticklabels())
        assert any(a.get_ylabel() for a in beside) or re.search("[a-z]", ticks) or not axis.get_yticks().size
    assert all(axis.get_ylabel() for axis in figure.axes if axis.get_label() == "<colorbar>")


@pytest.mark.slow
def test_one_legend_names_every_series_once_and_covers_no_panel(figure):
    assert not any(axis.get_legend() for axis in figure.axes)
    labels = {label for axis in figure.axes for label in axis.get_legend_handles_labels()[1]}
    if not figure.legends:
        assert not labels
        return
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == len(set(shown)) and labels - {"selected"} <= set(shown)
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    assert all(box.y0 >= axis.get_window_extent().y1 - 1 for axis in drawn(figure))


@pytest.mark.slow
def test_colours_are_those_of_the_palette_or_greys(figure):
    palette = {colors.to_rgb(colour) for colour in style.PALETTE}
    for axis in drawn(figure):
        shades = [line.get_color() for line in axis.lines]
        shades += [patch.get_facecolor() for patch in axis.patches if patch.get_fill()]
        for collection in axis.collections:
            shades += [*collection.get_facecolor(), *collection.get_edgecolor()]
        for shade in shades:
            red, green, blue = rgb = colors.to_rgb(shade)
            assert red == green == blue or rgb in palette, rgb
        assert {image.get_cmap().name.removesuffix("_r") for image in axis.images} <= {"viridis", "PuOr", "Blues"}


@pytest.mark.slow
def test_text_is_legible(figure):
    """No text is smaller than 7.5 points, and what is written on a colour has a contrast of at least 4.5."""

    def luminance(rgb):
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    texts = [text for axis in figure.axes for text in axis.findobj(plt.Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 7.5
    for axis in (axis for axis in drawn(figure) if axis.images):
        for text in axis.texts:
            if text.get_text():
                column, row = text.get_position()
                x, y = axis.transData.transform((column - 0.42, row)).round().astype(int)
                ratio = (luminance(np.array(colors.to_rgb(text.get_color()))) + 0.05) / (
                    luminance(figure.pixels[y, x]) + 0.05
                )
                assert max(ratio, 1 / ratio) >= 4.5, text.get_text()


@pytest.mark.slow
def test_texts_of_cells_stay_in_their_cells(figure):
    for axis in (axis for axis in drawn(figure) if axis.images):
        (x0, y0), (x1, y1) = axis.transData.transform([(0, 0), (1, 1)])
        for text in filter(plt.Text.get_text, axis.texts):
            box = text.get_window_extent()
            assert box.width <= abs(x1 - x0) and box.height <= abs(y1 - y0) + 1, text.get_text()


# --- the helpers ---------------------------------------------------------------------------------------------------


def test_a_heat_map_writes_on_colours_fades_and_leaves_cells_empty():
    _, axis = plt.subplots()
    values = [[0.0, 1.0], [np.nan, 0.0]]
    texts = [["dark", "bright"], ["", "pale"]]
    faded = [[False, False], [False, True]]
    image = heatmaps.heat_map(axis, values, texts, rows="ab", columns=[1, 2], limits=(0, 1), faded=faded)
    assert [text.get_color() for text in axis.texts] == ["white", "black", "black", "black"]
    assert image.get_array().mask.tolist() == [[False, False], [True, False]]
    assert image.get_alpha().tolist() == [[1, 1], [1, heatmaps.FADED]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2"]


def test_intervals_end_where_the_estimates_say():
    _, axis = plt.subplots()
    late = rate([True] * 9 + [False])
    intervals.interval_rows(axis, {"first": {"a": SHARE}, "second": {"a": late, "b": DIFFERENCE}})
    handles, labels = axis.get_legend_handles_labels()
    assert labels == ["a", "b"], "a metric that the first row lacks has its entry"
    segments = [segment[:, 0].tolist() for bars in axis.containers for segment in bars[2][0].get_segments()]
    ends = [[e.low, e.high] for e in (SHARE, late, DIFFERENCE)]
    assert np.allclose(segments, ends)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first row is on top"


def test_a_band_holds_the_intervals():
    _, axis = plt.subplots()
    intervals.interval_band(axis, [1, 2], [SHARE, DIFFERENCE], color=style.BLUE)
    heights = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert {round(float(y), 6) for y in heights} == {round(y, 6) for e in (SHARE, DIFFERENCE) for y in (e.low, e.high)}
    assert axis.lines[0].get_ydata() == pytest.approx([SHARE.value, DIFFERENCE.value])


def test_twelve_series_can_be_told_apart_without_their_colours_alone():
    looks = [style.series(k) for k in range(12)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 12
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == 12


@pytest.mark.parametrize(
    ("value", "digits", "text"), [(-0.04, 1, "0.0"), (-0.05001, 1, "-0.1"), (3.5, 0, "4"), (-0.4, 0, "0")]
)
def test_no_number_is_minus_nothing(value, digits, text):
    assert style.number(value, digits) == text


@pytest.mark.parametrize("count", [1, 8, 16, 17, 80])
def test_labels_are_thinned_where_there_are_many(count):
    labels = style.thinned(range(count))
    assert len(labels) == count and labels[0] == "0"
    assert sum(map(bool, labels)) <= style.LEGIBLE
    assert style.layer_names(count + 1) == [*labels, "end"]


# --- schematics ------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"
PARTS = {
    "sites": ("residual", "norm,", "attention output", "MLP output", "block input", "1", "2", "3", "A"),
    "template": ("template", "instruction", "post-instruction positions", "Guzzex", "\u22121", "layer 0", "site"),
    "interface": ("prompt", "filter:", "monitor:", "steering:", "reply", "prefill:", "activations", "weights"),
}


@pytest.mark.parametrize("name", schematics.ALT)
def test_a_schematic_is_an_image_that_needs_nothing_else_and_is_described(name):
    shown = plots.schematic(name).data
    assert shown == plots.schematic(name).data
    alt, data = re.fullmatch('<img alt="([^"<>]+)" src="data:image/svg[+]xml;base64,([^"]+)">', shown).groups()
    assert html.unescape(alt) == schematics.ALT[name] and len(alt) > 150
    root = ET.fromstring(base64.b64decode(data))
    assert root.get("role") == "img" and 600 <= int(root.get("width")) <= 720
    labels = root.get("aria-labelledby").split()
    assert [root.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")] == labels
    assert all(root.find(f"{SVG}{tag}").text.strip() for tag in ("title", "desc"))
    used = [value for item in root.iter() for key, value in item.attrib.items() if key.endswith(("href", "src"))]
    assert not used, "nothing is fetched"


@pytest.mark.parametrize("name", schematics.ALT)
def test_a_schematic_is_drawn_in_the_style_of_the_course(name):
    root = ET.parse(schematics.FOLDER / f"{name}.svg").getroot()
    strokes = {item.get("stroke") for item in root.iter()} - {None}
    coloured = {c for c in strokes if len(set(colors.to_rgb(c))) > 1}
    assert coloured and coloured <= set(style.PALETTE)
    background = root.find(f"{SVG}rect")
    assert background.get("fill") == "#ffffff", "dark mode shines through nothing"
    assert "sans-serif" in root.get("font-family")
    assert min(float(item.get("font-size", 12)) for item in root.iter()) >= 12


@pytest.mark.parametrize("name", schematics.ALT)
def test_a_schematic_names_its_parts(name):
    root = ET.parse(schematics.FOLDER / f"{name}.svg").getroot()
    texts = ["".join(item.itertext()) for item in root.iter(f"{SVG}text")]
    for part in PARTS[name]:
        assert any(text == part or text.startswith(part + " ") for text in texts), (part, texts)


def test_every_file_of_a_schematic_is_described():
    assert sorted(path.stem for path in schematics.FOLDER.iterdir()) == sorted(schematics.ALT) == sorted(PARTS)


@pytest.mark.parametrize("name", ["site", "", "../sites", "Sites"])
def test_an_unknown_schematic_names_the_choices(name):
    with pytest.raises(RefusalLabError, match="choose from sites, template, interface"):
        plots.schematic(name)


@pytest.mark.slow
def test_every_text_stands_out_from_what_is_behind_it(figure):
    assert faint_texts(figure) == []


@pytest.mark.parametrize(("ink", "paper", "found"), [("#777777", "white", True), ("#767676", "white", False)])
def test_faint_text_is_found(ink, paper, found):
    """The greys on both sides of 4.5 on white."""
    made = plt.figure(facecolor=paper)
    made.text(0.5, 0.5, "word", color=ink)
    assert bool(faint_texts(made)) == found


def test_faint_text_on_a_dark_cell_is_found():
    made, axis = plt.subplots()
    axis.imshow([[0.0, 1.0]], cmap="gray", aspect="auto")
    axis.text(0, 0, "dark on dark", color="#222222")
    axis.text(1, 0, "dark on light", color="#222222")
    assert [line.split(":")[0] for line in faint_texts(made)] == ["'dark on dark'"]
