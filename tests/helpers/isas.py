"""The instruction sets that this build and this processor offer."""

from inferlab import _C


def _offered(isa: str) -> bool:
    try:
        _C.force_isa(isa)
    except ValueError:
        return False
    _C.force_isa("auto")
    return True


ISAS = [isa for isa in _C.build_info()["isas"] if _offered(isa)]
