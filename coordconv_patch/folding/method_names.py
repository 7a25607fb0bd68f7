"""The names of methods that fold a module for inference."""

from __future__ import annotations

import inspect
import keyword

from torch import nn

from coordconv_patch.errors import ArgumentError

__all__ = ["folding_methods_of", "register_folding_method"]

_FOLDING_METHODS = dict.fromkeys(
    (
        "fuse",
        "fuse_block_residual_branches",  # super-gradients
        "fuse_bn",
        "fuse_conv_bn",
        "fuse_convs",
        "fuse_model",
        "fuse_repvgg_block",  # YOLOv7
        "full_fusion",  # super-gradients
        "partial_fusion",  # super-gradients
        "merge_bn",
        "merge_conv_bn",
        "merge_dilated_branches",
        "merge_kernel",
        "optimize_for_deployment",  # kornia
        "prepare_for_deploy",
        "reparameterize",
        "reparameterize_layer",  # docTR
        "reparameterize_unireplknet",
        "reparametrize",
        "structural_reparam",  # RepLKNet
        "convert_to_deploy",
        "switch_to_deploy",
    )
)
"""Names that libraries give to methods which fold a module for inference; see
:func:`register_folding_method`."""


def register_folding_method(name: str) -> None:
    """Let models that are patched from now on carry coordinates through one more method.

    For a method that folds batch norms or sums branches, of a name that this package does not
    know (it knows ``fuse``, ``reparameterize``, ``switch_to_deploy`` and about twenty more).
    Functions need no name: give them to :func:`coordconv_patch.fold_with`.

    Args:
        name: The method's name, as ``"to_inference_form"``.

    Raises:
        ArgumentError: If this is not a name, or that of a method which every module has.
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ArgumentError(f"name={name!r}: write the method's name, as 'to_inference_form'")
    if hasattr(nn.Module, name) or name == "forward":
        raise ArgumentError(
            f"name={name!r}: every torch.nn.Module has a method of this name, which does not fold; "
            "hand the folding function to fold_with(model, function)"
        )
    _FOLDING_METHODS[name] = None


def folding_methods_of(module: nn.Module) -> list[str]:
    """The names of the methods of a module's class that fold it.

    Static methods, class methods and functions without a ``self``, as ``fuse = torch.add`` gives,
    do not get the module, so it is not they who fold it.
    """
    kind = type(module)
    return [name for name in tuple(_FOLDING_METHODS) if _is_method(kind, name)]


def _is_method(kind: type[nn.Module], name: str) -> bool:
    if not callable(getattr(kind, name, None)):
        return False
    attribute = inspect.getattr_static(kind, name)
    return hasattr(attribute, "__get__") and not isinstance(attribute, (staticmethod, classmethod))
