"""llama.cpp at work, as ``worker.py`` is: a random model of one shape, through xllamacpp.

Its last layer computes one token only, so a layer's time is what a model of two layers takes longer
for the same prompt than a model of one. Attention is narrow, and adds nothing to what passes
through; so a token's hidden state is its embedding, and gates can be made for which llama.cpp
chooses, in every layer, the very experts that a case asks for, and weighs them as the case does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __name__ != "__main__":
    from coterie.bench import worker
else:  # under a peer's Python, with its folder on the path and nothing of ours installed
    import worker

HEAD = 64  # features of the one head
CERTAIN = 24.0  # logit of a chosen expert's weight 1; of experts that are not chosen it is 0
SMALL = 0.05  # of what experts add: it must not move the router of the next layer
LOUD = np.float32(8)  # a token's own logit: far larger ones would leave nothing of the others
KINDS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def opened(folder: Path, work: worker.Work, cases: list[worker.Case]) -> worker.Ready:
    """Writes the two models, and loads them."""
    tokens = [token for case in cases for token in range(len(case.ids))]
    if len(tokens) > work.hidden // 2:
        raise ValueError(f"{len(tokens)} tokens are too many to route in {work.hidden} features")
    embedding = embeddings(work, len(tokens))
    gate = gate_for(embedding, cases, work.experts)
    servers = {}
    for layers in (1, 2):
        path = folder / f"{layers}.gguf"
        write_model(path, work, layers, embedding, gate)
        servers[layers] = serve(path, work, len(cases[0].ids))
    width = len(cases[0].ids)

    def prompt(case: int) -> list[int]:
        return list(range(case * width, (case + 1) * width))

    def seconds(name: str, case: int) -> float:
        del name
        deep, shallow = (prompt_seconds(servers[layers], prompt(case)) for layers in (2, 1))
        return deep - shallow

    def error(name: str, case: int) -> float:
        del name
        last = (case + 1) * width - 1
        said = logits(servers[1], prompt(case), len(embedding))
        added = experts_of(work, embedding[last], cases[case].ids[-1], cases[case].weights[-1])
        return relative_error(said, embedding, last, added)

    packages = ("xllamacpp", "gguf", "numpy")
    return worker.Ready(("layer",), seconds, packages, error=error)


def embeddings(work: worker.Work, count: int) -> np.ndarray:
    """[count, H] fp32, each of unit size: a norm leaves them as they are."""
    draw = np.random.default_rng(work.seed + 1)
    rows = draw.standard_normal((count, work.hidden), dtype=np.float32)
    return rows / np.sqrt((rows**2).mean(axis=1, keepdims=True))


def gate_for(embedding: np.ndarray, cases: list[worker.Case], experts: int) -> np.ndarray:
    """[E, H] whose logits of every case's tokens are far above 0 at its experts, and 0 elsewhere:
    after a softmax over the chosen ones, their shares are the case's weights."""
    logits = np.zeros((len(embedding), experts))
    rows = iter(range(len(embedding)))
    for case in cases:
        for ids, weights in zip(case.ids, case.weights, strict=True):
            some = ids[ids >= 0]
            logits[next(rows), some] = CERTAIN + np.log(weights[: len(some)])
    wide = embedding.astype(np.float64)
    return (np.linalg.solve(wide @ wide.T, logits).T @ wide).astype(np.float32)


def experts_of(
    work: worker.Work, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """What the layer adds to a token x [H], in fp32; shares add up to 1, as Qwen3-MoE has them."""
    up, down = worker.few_experts(work)
    out = np.zeros_like(x)
    for expert, share in zip(ids % worker.FEW, weights / weights.sum(), strict=True):
        gate, value = np.split(up[expert] @ x, 2)
        out += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * value))
    return out * np.float32(SMALL)


def relative_error(said: np.ndarray, embedding: np.ndarray, last: int, added: np.ndarray) -> float:
    """How far logits [V] are from those of token ``last`` after one layer, as a part of what that
    layer changes in them. What all logits have in common does not count: a softmax loses it."""

    def seen(x: np.ndarray) -> np.ndarray:
        found = embedding @ (x / np.sqrt((x**2).mean())) * (LOUD / len(x))
        return found - found.mean()

    right, without = seen(embedding[last] + added), seen(embedding[last])
    off = said - said.mean() - right
    return float(np.linalg.norm(off) / np.linalg.norm(right - without))


def write_model(
    path: Path, work: worker.Work, layers: int, embedding: np.ndarray, gate: np.ndarray
) -> None:
    """A Qwen3-MoE of random weights; one matrix at a time, for a layer may be gigabytes."""
    gguf = import_module("gguf")
    kind = gguf.GGMLQuantizationType[KINDS[work.dtype]]
    whole = gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    describe(writer, work, layers, len(embedding))
    parts = list(matrices(work, layers, embedding, gate))
    held = [(name, few if times == 0 else gguf.quants.quantize(few, kind), times)
            for name, few, times in parts]  # fmt: skip
    for name, few, times in held:
        shape = (times or len(few), *few.shape[1:]) if few.ndim > 1 else few.shape
        size = few.nbytes // len(few) * shape[0]
        writer.add_tensor_info(name, shape, few.dtype, size, kind if times else whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, few, times in held:
        writer.write_tensor_data(few[np.arange(times) % len(few)] if times else few)
    writer.close()


def describe(writer, work: worker.Work, layers: int, vocabulary: int) -> None:
    """The model's sizes, and a vocabulary that only counts."""
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(work.hidden)
    writer.add_feed_forward_length(work.width)
    writer.add_expert_feed_forward_length(work.width)
    writer.add_expert_count(work.experts)
    writer.add_expert_used_count(work.k)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{token}" for token in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(vocabulary - 1)
    writer.add_add_bos_token(False)


def matrices(
    work: worker.Work, layers: int, embedding: np.ndarray, gate: np.ndarray
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, values and, of experts, how many copies of so few there are; 0: fp32, as it is."""
    up, down = worker.few_experts(work)
    hidden = work.hidden
    draw = np.random.default_rng(work.seed + 2)
    ones = np.ones(hidden, dtype=np.float32)
    narrow = draw.standard_normal((HEAD, hidden), dtype=np.float32) * np.float32(hidden**-0.5)
    yield "token_embd.weight", embedding, 0
    yield "output.weight", embedding * (LOUD / hidden), 0
    yield "output_norm.weight", ones, 0
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", ones, 0
        for name in ("attn_q", "attn_k", "attn_v"):
            yield f"blk.{layer}.{name}.weight", narrow, 0
        for name in ("attn_q_norm", "attn_k_norm"):
            yield f"blk.{layer}.{name}.weight", np.ones(HEAD, dtype=np.float32), 0
        yield f"blk.{layer}.attn_output.weight", np.zeros((hidden, HEAD), dtype=np.float32), 0
        yield f"blk.{layer}.ffn_gate_inp.weight", gate, 0
        yield f"blk.{layer}.ffn_gate_exps.weight", up[:, : work.width], work.experts
        yield f"blk.{layer}.ffn_up_exps.weight", up[:, work.width :], work.experts
        yield f"blk.{layer}.ffn_down_exps.weight", down * np.float32(SMALL), work.experts


def serve(path: Path, work: worker.Work, tokens: int):
    """llama.cpp's server over a model, with prompt batches of ``tokens``."""
    room = import_module("xllamacpp")
    params = room.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_batch, params.n_ubatch = 4 * tokens, tokens, tokens
    params.n_parallel, params.n_gpu_layers, params.warmup = 1, 0, False
    params.cache_prompt, params.cache_ram_mib, params.ctx_shift = False, 0, False
    for cores in (params.cpuparams, params.cpuparams_batch):
        cores.n_threads = work.threads
        cores.poll = 0  # threads that spin after their work would slow whoever comes next
    return room.Server(params)


def prompt_seconds(server, prompt: list[int]) -> float:
    """Of one prompt, as the server itself counts them."""
    asked = {"prompt": prompt, "n_predict": 1, "cache_prompt": False, "temperature": 0.0}
    told = server.handle_completions(asked)
    told = json.loads(told) if isinstance(told, str) else told
    if told["timings"]["prompt_n"] != len(prompt):
        raise ValueError(f"llama.cpp computed {told['timings']['prompt_n']} tokens of a prompt")
    return told["timings"]["prompt_ms"] / 1e3


def logits(server, prompt: list[int], vocabulary: int) -> np.ndarray:
    """[V] of the prompt's last token, up to a constant."""
    asked = {"prompt": prompt, "n_predict": 1, "cache_prompt": False, "temperature": 0.0}
    told = server.handle_completions({**asked, "n_probs": vocabulary})
    told = json.loads(told) if isinstance(told, str) else told
    found = np.full(vocabulary, np.nan, dtype=np.float32)
    for each in told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[each["id"]] = each["logprob"]
    return found


if __name__ == "__main__":
    worker.PEERS = {"llama.cpp": opened}
    sys.exit(worker.main())
