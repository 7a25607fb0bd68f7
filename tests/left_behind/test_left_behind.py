"""Trained coordinates that other code leaves behind are told; nothing else is."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from old_torch import BEFORE_2_11, IS_2_6, STRICT
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from watched_models import FEATURES, IMAGES, ConvBN, Net, fold_in_place, told, trained

import coordconv_patch as ccp
from coordconv_patch.errors import PatchError
from coordconv_patch.left_behind.watch import check_left_behind, is_watched


class Rep(nn.Module):
    """Branches, an identity among them, that a method of an unknown name makes one."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.large, self.small = ConvBN(8, 8, 3, groups), ConvBN(8, 8, 1, groups)
        self.identity = nn.BatchNorm2d(8)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "one"):
            return self.one(x)
        return self.large(x) + self.small(x) + self.identity(x)

    @torch.no_grad()
    def squash(self) -> None:
        self.one = nn.Conv2d(8, 8, 3, padding=1, groups=self.groups)
        bn: Any = self.identity
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        kernel = self.large.folded_weight()[0] + F.pad(self.small.folded_weight()[0], [1] * 4)
        for channel in range(8):
            kernel[channel, channel % (8 // self.groups), 1, 1] += scale[channel]
        self.one.weight.copy_(kernel)
        del self.large, self.small, self.identity


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def fold_anew(model: nn.Module) -> None:
    """A free function that makes new convolutions, as YOLOX's fuse_model."""
    for block in model.modules():
        if isinstance(block, ConvBN):
            old = block.conv
            new = nn.Conv2d(
                old.in_channels,
                old.out_channels,
                old.kernel_size,
                padding=old.padding,
                groups=old.groups,
            )
            new.weight.data, new.bias.data = block.folded_weight()  # type: ignore[union-attr]
            block.conv, block.bn = new, nn.Identity()


def fold_assigning(model: nn.Module) -> None:
    for block in model.modules():
        if isinstance(block, ConvBN):
            block.conv.weight.data, bias = block.folded_weight()
            block.conv.bias = nn.Parameter(bias)
            block.bn.reset_running_stats()
            block.bn.reset_parameters()


def replacing(make: Callable[[Any], nn.Module]) -> Callable[[nn.Module], None]:
    """What a library does that puts a layer of its own in place of each convolution."""

    def replace(model: nn.Module) -> None:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv2d):
                    setattr(parent, name, make(child))

    return replace


class Foreign(nn.Module):
    """No convolution by class, with the weight's values in a Parameter or in a buffer."""

    def __init__(self, conv: Any, as_buffer: bool = False, levels: int = 0) -> None:
        super().__init__()
        weight = conv.weight.detach().clone()
        if levels:
            step = weight.abs().amax((1, 2, 3), keepdim=True) / levels
            weight = (weight / step).round() * step
        if as_buffer:
            self.register_buffer("kernel", weight)
        else:
            self.kernel = nn.Parameter(weight)
        self.bias, self.padding, self.groups = conv.bias, conv.padding, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.bias, 1, self.padding, groups=self.groups)


def plain_twin(conv: Any) -> nn.Conv2d:
    """A plain convolution with the same Parameters; the old one is emptied, as by quanto."""
    twin = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        padding=conv.padding,
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    twin.weight, twin.bias = conv.weight, conv.bias
    for name, _ in list(conv.named_parameters()):
        setattr(conv, name, None)
    return twin


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "folding into new convolutions": fold_anew,
    "folding in place": fold_in_place,
    "folding by assigning .data": fold_assigning,
    "another class": replacing(Foreign),
    "another class with buffers": replacing(lambda conv: Foreign(conv, as_buffer=True)),
    "another class in 8 bits": replacing(lambda conv: Foreign(conv, levels=127)),
    "the same class, old ones emptied": replacing(plain_twin),
}


class TestErrors:
    """Where the result is surely wrong."""

    @pytest.mark.parametrize("groups", [1, 8])
    @pytest.mark.parametrize("where", ["all", "body.*"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_at_every_forward_until_accepted(self, change: str, where: str, groups: int) -> None:
        model = trained(Net(groups), where)
        model(IMAGES)
        CHANGES[change](model)
        for _ in range(2):
            with pytest.raises(PatchError, match=r"left behind at .*body\.0\.conv"):
                model(IMAGES)
        assert ccp.forget_left_behind_(model) is model
        assert told(lambda: (model(IMAGES), model.state_dict(), pickle.dumps(model))) == ("", [])

    @pytest.mark.parametrize("where", ["all", "*.large.*", "*.small.*"])
    @pytest.mark.parametrize("groups", [1, 8])
    def test_branches_that_are_summed(self, groups: int, where: str) -> None:
        model = trained(nn.Sequential(Rep(groups), Rep(groups)), where)
        for block in model:
            block.squash()
        with pytest.raises(PatchError, match="left behind at 0"):
            model(FEATURES)

    @pytest.mark.parametrize("where", ["all", "small"])
    def test_a_branch_that_is_added_to_one_that_stays(self, where: str) -> None:
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.large, self.small = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.large(x)

        model = trained(Pair(), where)
        model.large.weight.data += F.pad(model.small.weight.data, [1] * 4)
        del model.small
        with pytest.raises(PatchError, match=r"left behind at small \(now in large"):
            model(FEATURES)

    @pytest.mark.parametrize("way", ["forward", "state_dict", "compile"])
    def test_branches_that_stay_but_do_not_run(self, way: str) -> None:
        """As kornia's RepVggBlock keeps them."""
        model = trained(nn.Sequential(Rep(1), Rep(1)))
        for block in model:
            kept = dict(block.named_children())
            block.squash()
            for name, child in kept.items():
                setattr(block, name, child)
        if way == "forward":
            for _ in range(2):
                with pytest.raises(
                    PatchError, match=r"left behind at 0\.large\.conv \(now in 0\.one"
                ):
                    model(FEATURES)
            assert not model._forward_hooks
            return
        used = model if way == "state_dict" else torch.compile(model, backend="eager")
        error, said = told(lambda: used.state_dict() if way == "state_dict" else used(FEATURES))
        assert error == ""
        assert any("0.large.conv (also in 0.one (Conv2d))" in text for text in said)

    def test_transposed_convolution(self) -> None:
        model = trained(nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2), nn.ReLU()))
        new = nn.ConvTranspose2d(8, 4, 2, 2)
        new.weight.data = model[0].weight * torch.tensor([0.5, 2.0, 3.0, 4.0]).view(4, 1, 1)
        model[0] = new
        with pytest.raises(PatchError, match=r"left behind at 0 \(now in 0 \(ConvTranspose2d\)\)"):
            model(FEATURES)

    @pytest.mark.parametrize("change", ["folding into new convolutions", "folding in place"])
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m]
    )
    def test_copies_are_watched(self, copied: Callable[[Any], Any], change: str) -> None:
        model = copied(trained(Net()))
        CHANGES[change](model)
        model = copied(model) if copied is copy.deepcopy else model  # a pickle would tell already
        with pytest.raises(PatchError, match=r"body\.0\.conv"):
            model(IMAGES)

    @pytest.mark.parametrize(
        "use",
        {
            "inside another model": lambda m: nn.Sequential(nn.Identity(), m)(IMAGES),
            "a part of it alone": lambda m: m.body(FEATURES),
            "state_dict": lambda m: m.state_dict(),
            "torch.save": lambda m: torch.save(m, io.BytesIO()),
            "fold": ccp.fold,
            "export": lambda m: ccp.export_onnx(m, "never.onnx", IMAGES),
            "unpatch": ccp.unpatch,
            "jit.trace": lambda m: torch.jit.trace(m, IMAGES),
            "torch.export": lambda m: torch.export.export(m, (IMAGES,), strict=False),
        }.items(),
        ids=lambda use: use[0],
    )
    def test_every_use_tells(self, use: tuple[str, Callable[[Any], object]]) -> None:
        model = trained(Net())
        fold_anew(model)
        with pytest.raises(PatchError, match=r"body\.0\.conv"):
            use[1](model)
        assert not Path("never.onnx").exists()

    def test_compiled_models_tell(self) -> None:
        model = trained(Net())
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            compiled(IMAGES)
        fold_anew(model)
        with pytest.raises(PatchError, match=r"body\.0\.conv"):
            compiled(IMAGES)
        with pytest.raises(PatchError, match=r"body\.0\.conv"):
            torch.compile(model, backend="eager", fullgraph=True)(IMAGES)

    def test_a_part_tells_after_the_compiled_whole_has_run(self) -> None:
        model = trained(Net())
        with torch.no_grad():
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            compiled(IMAGES)
            compiled(IMAGES)  # not the call that compiles
        fold_anew(model.body)
        with pytest.raises(PatchError, match=r"body\.0\.conv"):
            model.body(FEATURES)

    @pytest.mark.parametrize("strict", [None, *STRICT[1:]])
    def test_code_that_dynamo_goes_through_warns(self, strict: bool | None) -> None:
        """An error cannot come out of dynamo as it is."""
        model = trained(Net())
        fold_anew(model)
        if strict:
            error, said = told(lambda: torch.export.export(model, (IMAGES,), strict=True))
        else:
            around = Around(model)
            compiled = torch.compile(around, backend="eager", fullgraph=True)
            error, said = told(lambda: compiled(IMAGES))
        assert not error or (strict and BEFORE_2_11)  # whose hooks run before dynamo's part begins
        assert any("body.0.conv" in text for text in (error, *said))

    def test_saving_coordinates_tells(self, tmp_path: Path) -> None:
        model = trained(Net())
        model.head = plain_twin(model.head)
        with pytest.raises(PatchError, match=r"left behind at head"):
            ccp.save_coords(model, tmp_path / "coords.safetensors")
        assert not list(tmp_path.iterdir())

    # Copies of GraphModules have no hooks in torch 2.6, so only the original is watched there.
    @pytest.mark.parametrize("copies", [0] if IS_2_6 else [0, 2])
    def test_graph_modules(self, copies: int) -> None:
        model = trained(fx.symbolic_trace(Net().eval()))
        for _ in range(copies):
            model = copy.deepcopy(model)
        model.body.get_submodule("0").conv = plain_twin(model.body.get_submodule("0").conv)
        with pytest.raises(PatchError, match=r"body\.0\.conv"):
            (model if IS_2_6 else copy.deepcopy(model))(IMAGES)

    def test_a_folded_model_is_watched_too(self) -> None:
        model = ccp.fold(trained(Net()))
        replacing(Foreign)(model)
        with pytest.raises(PatchError, match=r"body\.0\.conv"):
            model(IMAGES)

    def test_after_a_training(self) -> None:
        model = trained(Net()).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(IMAGES).square().mean().backward()
        optimizer.step()
        model.eval()
        fold_in_place(model)
        with pytest.raises(PatchError, match=r"body\.0\.conv"):
            model(IMAGES)

    def test_discarding_by_unpatch_ends_it(self) -> None:
        model = trained(Net())
        fold_anew(model)
        plain = ccp.unpatch_(model, discard=True)
        assert not is_watched(plain)
        assert told(lambda: (plain(IMAGES), plain.state_dict(), pickle.dumps(plain))) == ("", [])


class TestWarnings:
    """Where it may be meant: once."""

    @pytest.mark.parametrize("factor", [torch.rand(8, 1, 1, 1) + 0.5, torch.tensor(0.5)])
    def test_a_weight_scaled_through_data(self, factor: Tensor) -> None:
        model = trained(Net())
        model(IMAGES)
        model.stem.conv.weight.data.mul_(factor)
        error, said = told(lambda: model(IMAGES))
        assert error == ""
        assert len(said) == 1
        assert "through .data at stem.conv (by " in said[0]
        assert "and the trained coordinate weight was not" in said[0]
        assert told(lambda: model(IMAGES)) == ("", [])

    def test_what_nobody_can_know_is_not_said(self) -> None:
        """All weights scaled alike, of coordinates that no forward pass has seen."""
        model = trained(Net())
        scaled = nn.utils.parameters_to_vector(model.parameters()) * 1.5
        nn.utils.vector_to_parameters(scaled, model.parameters())
        error, said = told(lambda: model(IMAGES))
        assert (error, len(said)) == ("", 1)
        assert "Whether the trained coordinate weight was scaled alike cannot be told" in said[0]

    @pytest.mark.parametrize(
        ("inputs", "values"),
        {
            "wider": (4, lambda weight: F.pad(weight, [0] * 5 + [1])),
            "for grey images": (1, lambda weight: weight.sum(1, keepdim=True)),
            "for BGR": (3, lambda weight: weight.flip(1)),
            "channels sorted": (3, lambda weight: weight[weight.abs().sum((1, 2, 3)).argsort()]),
        }.values(),
    )
    def test_a_convolution_of_other_channels(
        self, inputs: int, values: Callable[[Tensor], Tensor]
    ) -> None:
        model = trained(Net())
        new = nn.Conv2d(inputs, 8, 3, padding=1, bias=False)
        new.weight.data = values(model.stem.conv.weight.data)
        model.stem.conv = new
        error, said = told(lambda: model(torch.randn(1, inputs, 8, 8)))
        assert error == ""
        assert len(said) == 1
        assert "gone at stem.conv (now in stem.conv (Conv2d))" in said[0]


def sgd(model: Any, steps: int, mode: bool) -> Iterator[None]:
    model.train(mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
        yield
    model.eval()


def old_style_training(model: Any) -> None:
    for _ in range(3):
        model(IMAGES).square().mean().backward()
        for parameter in model.parameters():
            parameter.data.mul_(1 - 1e-4)
            parameter.data.add_(parameter.grad, alpha=-1e-3)
            parameter.grad = None


def weight_decay_alone(model: Any) -> None:
    for _ in range(3):
        for parameter in model.parameters():
            parameter.data.mul_(1 - 1e-4)
        model(IMAGES)


def everything_scaled(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def averaged(model: Any) -> None:
    averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
    for _ in sgd(model, 2, True):
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        copy.deepcopy(average.eval())(IMAGES)
        average.state_dict()


def other_heads(model: Any) -> None:
    for head in (nn.Conv2d(8, 7, 1), nn.Conv2d(8, 5, 1), nn.Identity()):
        model.head = head
        model(IMAGES)
    model.body[0] = nn.Identity()


def norm_constraints(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = torch.renorm(module.weight.data, 2, 0, 0.2)
    model(IMAGES)
    model.stem.conv.weight.data.clamp_(-0.01, 0.01)


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.stem.conv, "weight", 0.5)
    model(IMAGES)
    prune.remove(model.stem.conv, "weight")
    model.stem.conv.weight.data[:4] = 0
    model(IMAGES)
    model.body[0].conv.weight.data.mul_(torch.rand(8, 8, 3, 3) > 0.5)


def parametrized(model: Any) -> None:
    parametrizations.weight_norm(model.stem.conv)
    model(IMAGES)
    parametrize.remove_parametrizations(model.stem.conv, "weight")


def moved(model: Any) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)(IMAGES.to(dtype))
    model.to(memory_format=torch.channels_last)


def loaded(model: Any) -> None:
    state = {name: 2 * value for name, value in trained(Net()).state_dict().items()}
    model.load_state_dict(state)
    model(IMAGES)
    model.load_state_dict(state, assign=True)
    model(IMAGES)
    model.load_state_dict(Net().state_dict())


def parts_alone(model: Any) -> None:
    for part in (model.body, copy.deepcopy(model.body), pickle.loads(pickle.dumps(model.body))):
        part(FEATURES)
    nn.Sequential(model.stem, model.body)(IMAGES)


def parts_unpatched(model: Any) -> None:
    ccp.unpatch_(model.body, discard=True)
    model(IMAGES)
    ccp.patch_(model.body, "all")


class Adapter(nn.Module):
    def __init__(self, base: nn.Conv2d, hidden: bool) -> None:
        super().__init__()
        if hidden:
            self.__dict__["base"] = base
            self.weight = base.weight
        else:
            self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


class Published(nn.Module):
    """The concatenating form, its weight joined or not."""

    def __init__(self, conv: Any, joined: bool) -> None:
        super().__init__()
        weights = (conv.weight.detach(), conv.coord_weight.detach())
        self.weights = nn.ParameterList([torch.cat(weights, 1)] if joined else weights)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat(tuple(self.weights), 1)
        return F.conv2d(F.pad(x, [0] * 4 + [0, 2]), joined, padding=joined.shape[-1] // 2)


def scaled_alike(model: Any) -> None:
    factor = torch.rand(8, 1, 1, 1) + 0.5
    model.stem.conv.weight.data.mul_(factor)
    model.stem.conv.coord_weight.data.mul_(factor)


def captured(model: Any) -> None:
    expected = model(IMAGES)
    for capture in (
        lambda: torch.compile(model, backend="eager", fullgraph=True)(IMAGES),
        lambda: torch.jit.trace(model, IMAGES)(IMAGES),
        lambda: torch.export.export(model, (IMAGES,)).module()(IMAGES),
        lambda: torch.func.functional_call(model, dict(model.named_parameters()), (IMAGES,)),
    ):
        torch.testing.assert_close(capture(), expected)


QUIET: dict[str, Callable[[Any], object]] = {
    "training": lambda model: list(sgd(model, 3, True)),
    "training in evaluation mode": lambda model: list(sgd(model, 3, False)),
    "training through .data": old_style_training,
    "weight decay alone": weight_decay_alone,
    "everything scaled": everything_scaled,
    "averages": averaged,
    "other heads": other_heads,
    "a stem for other images": lambda model: setattr(
        model, "stem", nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    ),
    "norm constraints": norm_constraints,
    "pruning": pruned,
    "parametrizations": parametrized,
    "other dtypes and formats": moved,
    "checkpoints": loaded,
    "parts alone": parts_alone,
    "parts unpatched": parts_unpatched,
    "wrappers": replacing(lambda conv: Adapter(conv, hidden=False)),
    "wrappers that hide the layer": replacing(lambda conv: Adapter(conv, hidden=True)),
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "the published form": replacing(lambda conv: Published(conv, joined=False)),
    "the published form, joined": replacing(lambda conv: Published(conv, joined=True)),
    "coordinates scaled alike": scaled_alike,
    "captures": captured,
}


class TestNoAlarm:
    """Nothing is said of what happens to models every day."""

    @pytest.mark.parametrize("what", QUIET)
    def test_of(self, what: str) -> None:
        model = trained(Net())
        model(IMAGES)

        def run() -> None:
            QUIET[what](model)
            for used in (model, copy.deepcopy(model) if what != "parametrizations" else model):
                used(IMAGES)
                used.state_dict()
                check_left_behind(used)

        assert told(run) == ("", [])

    def test_of_untrained_coordinates(self) -> None:
        for change in CHANGES.values():
            model = ccp.patch(Net().eval(), "all")
            model(IMAGES)
            change(model)
            assert told(lambda model=model: model(IMAGES)) == ("", [])

    def test_of_folding_that_carries_coordinates(self) -> None:
        model = trained(Net())
        expected = model(IMAGES)
        folded = ccp.fold_with(model, fold_anew)
        assert is_watched(folded)
        assert told(lambda: torch.testing.assert_close(folded(IMAGES), expected)) == ("", [])

    def test_of_a_teacher_with_equal_weights(self) -> None:
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.student: Any = Net()
                self.teacher = copy.deepcopy(self.student)

            def forward(self, x: Tensor) -> Tensor:
                return self.teacher(x)

        model = trained(Pair(), "student.*")
        del model.student
        assert told(lambda: model(IMAGES)) == ("", [])

    def test_of_a_second_network_with_the_same_weights(self) -> None:
        class Ensemble(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first: Any = Net()

            def forward(self, x: Tensor) -> Tensor:
                return self.first(x) + (self.second(x) if hasattr(self, "second") else 0)

        model = trained(Ensemble())
        model.second = ccp.unpatch(model.first, discard=True)
        assert told(lambda: (model(IMAGES), model(IMAGES), model.state_dict())) == ("", [])

    def test_in_a_symbolic_trace_and_no_nodes(self) -> None:
        model = copy.deepcopy(trained(Net()))  # its first look happens while it is traced
        plain = ccp.unpatch(model, discard=True)
        nodes = [len(fx.symbolic_trace(each).graph.nodes) for each in (model, plain)]
        assert nodes[0] == nodes[1]
        traced = torch.jit.trace(copy.deepcopy(model), IMAGES)
        assert "sample" not in str(traced.graph)
        for strict in STRICT[1:]:
            exported = torch.export.export(copy.deepcopy(model), (IMAGES,), strict=strict)
            again = torch.export.export(ccp.patch(Net().eval(), "all"), (IMAGES,), strict=strict)
            assert len(exported.graph.nodes) == len(again.graph.nodes)


@pytest.mark.parametrize("inside", [False, True])
def test_models_of_a_kind_are_compiled_once(inside: bool) -> None:
    """As plain ones are: else the ninth is one too many for torch's limit of recompilations."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    tells_hooks_by_identity = torch.__version__ < "2.8"
    models = [trained(Net()) for _ in range(5 if tells_hooks_by_identity else 10)]
    with torch.no_grad():
        for model in models:
            compiled = torch.compile(
                Around(model) if inside else model, backend=backend, fullgraph=True
            )
            torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    assert len(graphs) == (len(models) if tells_hooks_by_identity else 1)
    torch._dynamo.reset()


def test_unpatch_leaves_no_trace() -> None:
    model = Net()
    plain = ccp.unpatch(ccp.patch(model, "all"))
    assert not is_watched(plain)
    for before, after in zip(model.modules(), plain.modules(), strict=True):
        assert vars(before).keys() == vars(after).keys()
        assert not after._state_dict_pre_hooks


def test_nothing_is_kept_alive_by_the_watch() -> None:
    model = trained(Net())
    old = model.head.weight.data_ptr()
    model.head = nn.Conv2d(8, 5, 1)
    model(IMAGES)
    kept: list[Any] = list(model._forward_pre_hooks.values())
    assert all(
        weight.data_ptr() != old for hook in kept for weight in hook.inventory.weights.values()
    )
