"""Imports torchvision, also where its compiled part does not load.

PyPI's torchvision is built against the CUDA build of PyTorch. Beside a CPU-only PyTorch its library of
detection operators cannot be loaded, and `import torchvision` then fails with `operator torchvision::nms
does not exist`, because it registers shape functions for operators that nobody declared. Transforms,
ImageFolder and timm need none of these operators. So their names are declared here, without any
implementation (a call of one still fails), and the import is tried again. Where torchvision imports by
itself, nothing is declared.

Import this module before anything that imports torchvision, timm included.
"""

import sys

import torch

DETECTION_OPS = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)


def _declare_detection_ops():
    library = torch.library.Library("torchvision", "DEF")
    for name in DETECTION_OPS:
        library.define(f"{name}() -> ()")
    return library


_library = None  # the declarations live as long as this object

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::" not in str(error):
        raise
    # The failed import leaves half-initialised submodules behind, which a second import would take as they are.
    for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_name]
    _library = _declare_detection_ops()
    import torchvision

__all__ = ["torchvision"]
