"""The contrast of a figure's text with what lies behind it, by the formula of WCAG 2.1 (success criterion 1.4.3)."""

import numpy as np
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

LEAST, LEAST_LARGE, LARGE = 4.5, 3.0, 18  # ratios; points from which text counts as large


def luminance(rgb):
    """Relative luminance of colours [..., 3] in 0 to 1."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def ratio(first, second):
    """Contrast of two colours, from 1 to 21."""
    light, dark = sorted((float(luminance(first)), float(luminance(second))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def faint_texts(figure):
    """A line for each text of the figure with too little contrast, with its ratio."""
    canvas = FigureCanvasAgg(figure)  # a figure that was closed has lost its own
    canvas.draw()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    alphas = [text.get_alpha() for text in texts]
    for text in texts:
        text.set_alpha(0)  # and not invisible: the layout makes no room for what is invisible
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., :3] / 255  # [height, width, 3], the first row on top
    for text, alpha in zip(texts, alphas, strict=True):
        text.set_alpha(alpha)
    found = []
    height, width = page.shape[:2]
    for text in texts:
        box = text.get_window_extent()
        rows = slice(max(0, int(height - box.y1)), min(height, int(np.ceil(height - box.y0))))
        columns = slice(max(0, int(box.x0)), min(width, int(np.ceil(box.x1))))
        behind = page[rows, columns].reshape(-1, 3)
        if not len(behind):
            continue  # outside the figure: nobody sees it
        behind = np.median(behind, axis=0)  # a thin line behind a word does not make it illegible
        red, green, blue, opacity = colors.to_rgba(text.get_color(), text.get_alpha())
        ink = opacity * np.array([red, green, blue]) + (1 - opacity) * behind
        contrast = ratio(ink, behind)
        if contrast < (LEAST_LARGE if text.get_fontsize() >= LARGE else LEAST):
            found.append(f"{text.get_text()!r}: {contrast:.1f}")
    return found
