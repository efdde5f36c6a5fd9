"""The prompt sets of the paper (Arditi et al. 2024, arXiv 2406.11717), downloaded on first use.

They hold harmful instructions, so the project does not ship them. Each file is pinned to a commit of the
paper's repository and to its SHA-256, and is kept in the user's cache folder. No lab needs them: they are for
hub models.
"""

import json
from pathlib import Path

import pooch
import requests

from refusallab.errors import RefusalLabError

BASE_URL = (
    "https://raw.githubusercontent.com/andyrdt/refusal_direction/9d852fae1a9121c78b29142de733cb1340770cc3/dataset/"
)
CACHE = pooch.os_cache("refusallab")

# (name, split): (path below BASE_URL, SHA-256)
FILES = {
    ("harmful", "train"): (
        "splits/harmful_train.json",
        "8f5c0eac0efd2a7f99084bbe8d0de2c465e31b1997184783c917969d9de9ece1",
    ),
    ("harmful", "val"): (
        "splits/harmful_val.json",
        "305f1d1e6dfa6c50a32d24a18ef815f42b5441eb83e6d7767d242107162fd9f4",
    ),
    ("harmful", "test"): (
        "splits/harmful_test.json",
        "5e12ae102c3791dee083a69ab6269a78e033411c629bc3f66f75d2fde196d9ef",
    ),
    ("harmless", "train"): (
        "splits/harmless_train.json",
        "86623b1f8a25aa35df153fc97a556dbcebb6a7c881538ae43ee479ca17f2e002",
    ),
    ("harmless", "val"): (
        "splits/harmless_val.json",
        "772010758e7d771ef4c7e5e4acdfd7598dcece1a6f383f20d382f640913a2a4d",
    ),
    ("harmless", "test"): (
        "splits/harmless_test.json",
        "1b5930ce5e855ada758b3116ce7c4aaea9b9d05f8cdd77b385511d4c84173b19",
    ),
    ("harmbench", "test"): (
        "processed/harmbench_test.json",
        "606bca20a5212e676840ca928070e0905486df1bcc1f5f0223e7a76d8be62fd5",
    ),
    ("jailbreakbench", "test"): (
        "processed/jailbreakbench.json",
        "3a5aefa80c4a35f75a5306303aa8e69801e4ca4584e1f598bd2ddcf3e7fbbcdd",
    ),
}


def published(name: str, split: str) -> list[str]:
    """The instructions of one published set, in file order, duplicates kept.

    name and split: a key of `FILES`, such as ("harmful", "val"). The first call downloads the file, later
    calls read the cache. Raises RefusalLabError for an unknown set, without a network, for a checksum that
    differs from the pinned one and when the file cannot be saved.
    """
    if (name, split) not in FILES:
        known = ", ".join(f"{n}/{s}" for n, s in FILES)
        raise RefusalLabError(f"There is no published prompt set {name}/{split}; choose one of {known}.")
    path, sha256 = FILES[name, split]
    fetcher = pooch.create(path=CACHE, base_url=BASE_URL, registry={path: f"sha256:{sha256}"})
    try:
        file = fetcher.fetch(path)
    except requests.RequestException as error:
        status = f"status {error.response.status_code}" if error.response is not None else "no connection"
        raise RefusalLabError(
            f"The published prompts {name}/{split} could not be downloaded ({status}): check the network and "
            "run this again. The bundled prompts and models need no network."
        ) from error
    except OSError as error:
        raise RefusalLabError(
            f"The published prompts {name}/{split} could not be saved in {CACHE} "
            f"({error.strerror or error}): free some space there or make it writable, and run this again."
        ) from error
    except ValueError as error:
        raise RefusalLabError(
            f"The published prompts {name}/{split} arrived with another checksum than the pinned one and "
            "were discarded: run this again, on another network if it happens twice (proxies change files)."
        ) from error
    return [item["instruction"] for item in json.loads(Path(file).read_text(encoding="utf-8"))]
