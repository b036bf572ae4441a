"""The training corpus: the running interpreter's standard library, or texts of a folder, read in
place.

The split is by file, never by line: a file is held out when a hash of its relative path falls in
the lowest `HELDOUT_FRACTION` of the hash range, so the same file is held out on every machine and
in every Python version that ships it.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HELDOUT_FRACTION = 0.05
SUFFIXES = (".py", ".txt", ".md", ".rst")
"""Of the texts of a folder."""

# Not Python prose: character tables, generated help topics, and build settings of one machine.
_SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data"})
_SKIPPED_PREFIX = "_sysconfigdata"
_TEST_DIRS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class Corpus:
    """Text files below one folder.

    Attributes:
        root: folder that all paths are relative to.
        paths: POSIX paths relative to `root`, sorted.
    """

    root: Path
    paths: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(cls, root: Path | None = None) -> Corpus:
        """The texts below `root`, by default the `.py` files of the standard library.

        Raises:
            ValueError: no usable file was found, or nothing would be left to train on or to hold
                out.
        """
        suffixes = SUFFIXES[:1] if root is None else SUFFIXES
        root = stdlib_root() if root is None else Path(root)
        paths: list[str] = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED_DIRS]
            paths += [
                (Path(folder) / name).relative_to(root).as_posix()
                for name in names
                if name.endswith(suffixes) and not name.startswith(_SKIPPED_PREFIX)
            ]
        corpus = cls(root, tuple(sorted(paths)))
        if not corpus.train_files() or not corpus.heldout_files():
            raise ValueError(
                f"--corpus {root}: {len(corpus.train_files())} training and "
                f"{len(corpus.heldout_files())} held-out texts found ({', '.join(SUFFIXES)}), at "
                "least 1 of each needed; name a folder with more, or leave --corpus out to use the "
                "interpreter's standard library"
            )
        return corpus

    def train_files(self) -> list[str]:
        """Relative paths to learn from: everything that is not held out."""
        return [path for path in self.paths if not is_heldout(path)]

    def heldout_files(self) -> list[str]:
        """Relative paths never trained on; library files only, no test suites."""
        return [path for path in self.paths if is_heldout(path)]

    def read(self, path: str) -> str:
        """Text of one file, with newlines as `\\n`; empty when it is not UTF-8."""
        try:
            return (self.root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return ""


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_test_file(path: str) -> bool:
    """Whether a relative path belongs to a test suite."""
    parts = path.split("/")
    return bool(_TEST_DIRS.intersection(parts[:-1])) or parts[-1].startswith("test_")


def path_hash(path: str) -> float:
    """Hash of a relative path, uniform in [0, 1) and the same everywhere."""
    digest = hashlib.sha256(path.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def is_heldout(path: str) -> bool:
    """Whether the file at this relative path is held out of training."""
    return not is_test_file(path) and path_hash(path) < HELDOUT_FRACTION


def heldout_files() -> list[Path]:
    """Absolute paths of the standard library files that the bundled models never saw."""
    corpus = Corpus.of()
    return [corpus.root / path for path in corpus.heldout_files()]


def heldout_prompts(num_prompts: int = 20, *, max_chars: int = 240) -> list[str]:
    """Prompts for tests and benchmarks, cut from held-out standard library files.

    One prompt per file and round; each round looks at a different place of the file. A prompt
    consists of whole lines, has at most `max_chars` characters (about 60 to 80 tokens of the
    bundled tokenizer at the default) and does not end in a newline.

    Args:
        num_prompts: how many to return, at least 1.
        max_chars: upper bound for the length of a prompt in characters, at least 40.

    Returns:
        `num_prompts` texts, the same on every call with one Python version.

    Raises:
        ValueError: an argument is out of range, or the held-out files are too short.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts is {num_prompts}, expected at least 1")
    if max_chars < 40:
        raise ValueError(f"max_chars is {max_chars}, expected at least 40")
    return cut_prompts(Corpus.of(), num_prompts, max_chars=max_chars)


def cut_prompts(corpus: Corpus, num_prompts: int, *, max_chars: int) -> list[str]:
    """`heldout_prompts` for any corpus.

    Raises:
        ValueError: the held-out files do not hold that many different prompts.
    """
    # Files shorter than this have no middle that is both behind the header and before the end.
    min_chars = 8 * max_chars
    texts = [corpus.read(path) for path in corpus.heldout_files()]
    texts = [text for text in texts if len(text) >= min_chars]
    prompts: list[str] = []
    seen: set[str] = set()
    # Round 0 cuts at the middle, then quarters, eighths, ...
    for place in _van_der_corput(64):
        for text in texts:
            prompt = _whole_lines(text, int(place * len(text)), max_chars)
            if len(prompt) >= max_chars // 4 and prompt not in seen:
                seen.add(prompt)
                prompts.append(prompt)
                if len(prompts) == num_prompts:
                    return prompts
    raise ValueError(
        f"{corpus.root}: only {len(prompts)} held-out prompts of at most {max_chars} characters "
        f"found, {num_prompts} wanted; ask for fewer or shorter ones"
    )


def training_prompts(corpus: Corpus, num_prompts: int, *, max_chars: int = 240) -> list[str]:
    """As `heldout_prompts`, from files that are trained on: one from the middle of each.

    Raises:
        ValueError: there are fewer such files.
    """
    files = corpus.train_files()
    step = max(len(files) // num_prompts, 1)
    prompts: list[str] = []
    for path in (*files[::step], *files):
        text = corpus.read(path)
        prompt = _whole_lines(text, len(text) // 2, max_chars)
        if len(text) >= 8 * max_chars and len(prompt) >= max_chars // 4 and prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == num_prompts:
            return prompts
    raise ValueError(
        f"{corpus.root}: only {len(prompts)} prompts found, {num_prompts} wanted; ask for fewer"
    )


def _van_der_corput(count: int) -> list[float]:
    """1/2, 1/4, 3/4, 1/8, 5/8, ...: points of (0, 1), each far from the ones before."""
    points = []
    for number in range(1, count + 1):
        point, denominator = 0.0, 1.0
        while number:
            denominator *= 2.0
            number, bit = divmod(number, 2)
            point += bit / denominator
        points.append(point)
    return points


def _whole_lines(text: str, start: int, max_chars: int) -> str:
    """Whole lines of `text` from the first line starting at or after `start`."""
    begin = text.find("\n", start) + 1
    piece = text[begin : begin + max_chars + 1]
    # Without the last newline, as indentation may follow it that belongs to the continuation.
    return piece[: max(piece.rfind("\n"), 0)].strip("\n")


def training_texts(corpus: Corpus, epoch: int, *, test_share: int) -> Sequence[str]:
    """Texts of one epoch: every library file, and every `test_share`-th test file in turn.

    Test suites are larger than the library itself and more monotonous, so they are spread over
    `test_share` epochs.
    """
    return [
        text
        for index, path in enumerate(corpus.train_files())
        if not is_test_file(path) or index % test_share == epoch % test_share
        if (text := corpus.read(path))
    ]
