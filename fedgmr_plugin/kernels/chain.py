"""Plain stacks: torch's own layers in sequence, called one after the other and by nobody else."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def is_chain(model: nn.Module) -> bool:
    """Whether `model` is torch's own layers in sequence, without hooks: no code but theirs sees a weight."""
    return all(
        type(m).__module__.startswith("torch.nn.modules.")
        and (type(m) is nn.Sequential or not any(True for _ in m.children()))
        and not is_intercepted(m)
        for m in model.modules()
    )


def is_intercepted(module: nn.Module) -> bool:
    """Whether other code than its class's ``forward`` runs when `module` is called."""
    m = module
    hooks = m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks
    return any(hooks) or "forward" in m.__dict__


def layers(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of nested ``Sequential`` modules as they are called, with repetitions."""
    if type(model) is not nn.Sequential:
        yield name, model
        return
    for key, child in model._modules.items():
        if child is not None:
            yield from layers(child, f"{name}.{key}" if name else key)
