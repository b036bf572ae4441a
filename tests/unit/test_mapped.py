"""Weights out of mapped files: the same numbers in memory of their own, and the files' given up."""

from __future__ import annotations

import mmap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab import _C
from inferlab.models import HFModel, loading
from inferlab.models.mapped import unmap


def is_mapped(tensor: torch.Tensor) -> bool:
    return not tensor.untyped_storage().resizable()


class Module(nn.Module):
    """Two names for one weight, a view that is not contiguous, and a buffer."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.a = nn.Parameter(weights["a"])
        self.same = self.a
        self.again = nn.Parameter(weights["a"])
        self.turned = nn.Parameter(weights["a"].t())
        self.register_buffer("bytes", weights["bytes"])
        self.register_buffer("none", weights["none"])


@pytest.fixture
def written() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(300, 500, generator=generator).bfloat16(),
        "bytes": torch.randint(0, 256, (70, 999), generator=generator).byte(),
        "none": torch.zeros(0, 3),
    }


def test_weights_keep_their_numbers_and_who_shares_them(tmp_path, written):
    save_file(written, tmp_path / "weights")
    module = Module(load_file(tmp_path / "weights"))
    assert is_mapped(module.a), "as safetensors reads files"
    unmap(module)
    assert not is_mapped(module.a)
    assert not is_mapped(module.bytes)
    assert torch.equal(module.a, written["a"])
    assert torch.equal(module.bytes, written["bytes"])
    assert torch.equal(module.turned, written["a"].t())
    assert module.same is module.a
    assert module.again.data_ptr() == module.a.data_ptr()
    module.a.data[0, 0] = 7
    assert load_file(tmp_path / "weights")["a"][0, 0] == written["a"][0, 0]


def test_what_was_written_before_is_kept(tmp_path, written):
    save_file(written, tmp_path / "weights")
    module = Module(load_file(tmp_path / "weights"))
    with torch.no_grad():
        module.a[200] = 3
    unmap(module)
    assert (module.a[200] == 3).all()
    assert torch.equal(module.a[:200], written["a"][:200])


def test_loaded_models_are_mapped_no_more(tmp_path):
    made = tiny_model("gpt2")  # tied
    made.save_pretrained(tmp_path)
    tiny_tokenizer(made.config.vocab_size).save_pretrained(tmp_path)
    model = loading.load(tmp_path).model
    assert not any(map(is_mapped, model.parameters()))
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, weight in made.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert HFModel.load(tmp_path, quantization="int8").quantization == "int8"


def test_discarded_pages_hold_what_their_file_does(tmp_path):
    size = 16 * mmap.PAGESIZE
    (tmp_path / "file").write_bytes(b"\x05" * size)
    mapped = torch.from_file(str(tmp_path / "file"), size=size, dtype=torch.uint8)
    mapped[:] = 9  # of a private map: the file is as it was
    if not _C.discard_pages(mapped[10:]):
        pytest.skip("this system does not give pages back")
    assert (mapped[: mmap.PAGESIZE] == 9).all(), "a page of which a part was not named"
    assert (mapped[mmap.PAGESIZE :] == 5).all()
    assert _C.discard_pages(mapped[:100]) is False, "there is no whole page in it"
    with pytest.raises(ValueError, match="data"):
        _C.discard_pages(mapped[::2])
