"""Router scores to draw from: any router, any block, with and without ties."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from coterie.values import DecodeProgress, RouterSpec, Scores


@st.composite
def routers(draw: st.DrawFn, *, groups: bool = True) -> RouterSpec:
    count = draw(st.sampled_from((1, 2, 4, 8) if groups else (1,)))
    size = draw(st.integers(max(2, math.ceil(4 / count)), 64 // count))
    top_groups = draw(st.integers(1, count))
    renormalise = draw(st.booleans())
    return RouterSpec(
        experts=count * size,
        k=draw(st.integers(1, min(8, top_groups * size))),
        activation=draw(st.sampled_from(("softmax", "sigmoid"))),
        renormalise=renormalise,
        scale=draw(st.sampled_from((1.0, 2.5))),
        groups=count,
        topk_groups=top_groups,
        biased_weight=draw(st.booleans()) and not renormalise,
        epsilon=draw(st.sampled_from((0.0, 1e-20))),
    )


@st.composite
def blocks(
    draw: st.DrawFn,
    *,
    ties: bool | None = None,
    groups: bool = True,
    rows: int | None = None,
) -> Scores:
    """Scores of a block: any router, 1 - 40 tokens; small integer logits give ties."""
    router = draw(routers(groups=groups))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (rows or draw(st.integers(1, 3)), draw(st.integers(1, 40)))
    if draw(st.booleans()) if ties is None else ties:
        logits = torch.randint(-2, 3, (*shape, router.experts), generator=generator).float()
        bias = torch.randint(-1, 2, (router.experts,), generator=generator) / 4
    else:
        logits = 2 * torch.randn(*shape, router.experts, generator=generator)
        bias = torch.randn(router.experts, generator=generator) / 4
    return Scores(
        logits=logits,
        router=router,
        bias=bias if draw(st.booleans()) else None,
        voters=coin(shape, generator) if draw(st.booleans()) else None,
        progress=DecodeProgress(
            masked=coin(shape, generator),
            after_eos=coin(shape, generator),
            uncertainty=torch.rand(shape, generator=generator),
        ),
        importance=torch.rand(shape, generator=generator),
        resident=coin((router.experts,), generator),
        layer=draw(st.integers(0, 20)),
        forward_indices=tuple(range(5, 5 + shape[0])),
    )


def coin(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).bool()
