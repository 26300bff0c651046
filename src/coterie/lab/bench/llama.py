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
    from coterie.lab.bench import worker
else:  # under a peer's Python, with its folder on the path and nothing of ours installed
    import worker

HEAD_DIM = 64  # features of the one head
GATE_LOGIT = 24.0  # logit of a chosen expert's weight 1; of experts that are not chosen it is 0
EXPERT_SCALE = 0.05  # of what experts add: it must not move the router of the next layer
LOGIT_SCALE = np.float32(
    8
)  # a token's own logit: far larger ones would leave nothing of the others
GGUF_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def start_baseline(
    folder: Path, workload: worker.LayerWorkload, cases: list[worker.TimedCase]
) -> worker.BaselineRunner:
    """Writes the two models, and loads them."""
    tokens = [token for case in cases for token in range(len(case.ids))]
    if len(tokens) > workload.hidden // 2:
        raise ValueError(
            f"{len(tokens)} tokens are too many to route in {workload.hidden} features"
        )
    embedding = make_embeddings(workload, len(tokens))
    gate = make_gate(embedding, cases, workload.experts)
    servers = {}
    for layers in (1, 2):
        path = folder / f"{layers}.gguf"
        write_model(path, workload, layers, embedding, gate)
        servers[layers] = start_server(path, workload, len(cases[0].ids))
    width = len(cases[0].ids)

    def prompt(case: int) -> list[int]:
        return list(range(case * width, (case + 1) * width))

    def seconds(name: str, case: int) -> float:
        del name
        two_layers, one_layer = (prompt_seconds(servers[layers], prompt(case)) for layers in (2, 1))
        return two_layers - one_layer

    def error(name: str, case: int) -> float:
        del name
        last = (case + 1) * width - 1
        actual = prompt_logits(servers[1], prompt(case), len(embedding))
        expert_delta = expert_output(
            workload, embedding[last], cases[case].ids[-1], cases[case].weights[-1]
        )
        return relative_error(actual, embedding, last, expert_delta)

    packages = ("xllamacpp", "gguf", "numpy")
    return worker.BaselineRunner(("layer",), seconds, packages, relative_error=error)


def make_embeddings(workload: worker.LayerWorkload, count: int) -> np.ndarray:
    """[count, H] fp32, each of unit size: a norm leaves them as they are."""
    rng = np.random.default_rng(workload.seed + 1)
    rows = rng.standard_normal((count, workload.hidden), dtype=np.float32)
    return rows / np.sqrt((rows**2).mean(axis=1, keepdims=True))


def make_gate(embedding: np.ndarray, cases: list[worker.TimedCase], experts: int) -> np.ndarray:
    """[E, H] whose logits of every case's tokens are far above 0 at its experts, and 0 elsewhere:
    after a softmax over the chosen ones, their shares are the case's weights."""
    logits = np.zeros((len(embedding), experts))
    rows = iter(range(len(embedding)))
    for case in cases:
        for ids, weights in zip(case.ids, case.weights, strict=True):
            valid_ids = ids[ids >= 0]
            logits[next(rows), valid_ids] = GATE_LOGIT + np.log(weights[: len(valid_ids)])
    embedding64 = embedding.astype(np.float64)
    return (np.linalg.solve(embedding64 @ embedding64.T, logits).T @ embedding64).astype(np.float32)


def expert_output(
    workload: worker.LayerWorkload, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """What the layer adds to a token x [H], in fp32; shares add up to 1, as Qwen3-MoE has them."""
    up, down = worker.make_experts(workload)
    out = np.zeros_like(x)
    for expert, expert_weight in zip(
        ids % worker.DISTINCT_EXPERTS, weights / weights.sum(), strict=True
    ):
        gate, value = np.split(up[expert] @ x, 2)
        out += expert_weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * value))
    return out * np.float32(EXPERT_SCALE)


def relative_error(
    actual: np.ndarray, embedding: np.ndarray, last: int, expert_delta: np.ndarray
) -> float:
    """How far logits [V] are from those of token ``last`` after one layer, as a part of what that
    layer changes in them. What all logits have in common does not count: a softmax loses it."""

    def output_logits(x: np.ndarray) -> np.ndarray:
        centred = embedding @ (x / np.sqrt((x**2).mean())) * (LOGIT_SCALE / len(x))
        return centred - centred.mean()

    expected, without_layer = (
        output_logits(embedding[last] + expert_delta),
        output_logits(embedding[last]),
    )
    deviation = actual - actual.mean() - expected
    return float(np.linalg.norm(deviation) / np.linalg.norm(expected - without_layer))


def write_model(
    path: Path, workload: worker.LayerWorkload, layers: int, embedding: np.ndarray, gate: np.ndarray
) -> None:
    """A Qwen3-MoE of random weights; one matrix at a time, for a layer may be gigabytes."""
    gguf = import_module("gguf")
    expert_type = gguf.GGMLQuantizationType[GGUF_TYPES[workload.dtype]]
    float_type = gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    write_metadata(writer, workload, layers, len(embedding))
    tensors = list(model_tensors(workload, layers, embedding, gate))
    stored = [(name, values if copies == 0 else gguf.quants.quantize(values, expert_type), copies)
            for name, values, copies in tensors]  # fmt: skip
    for name, values, copies in stored:
        shape = (copies or len(values), *values.shape[1:]) if values.ndim > 1 else values.shape
        size = values.nbytes // len(values) * shape[0]
        writer.add_tensor_info(
            name, shape, values.dtype, size, expert_type if copies else float_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values, copies in stored:
        writer.write_tensor_data(values[np.arange(copies) % len(values)] if copies else values)
    writer.close()


def write_metadata(writer, workload: worker.LayerWorkload, layers: int, vocabulary: int) -> None:
    """The model's sizes, and a vocabulary that only counts."""
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(workload.hidden)
    writer.add_feed_forward_length(workload.width)
    writer.add_expert_feed_forward_length(workload.width)
    writer.add_expert_count(workload.experts)
    writer.add_expert_used_count(workload.k)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{token}" for token in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(vocabulary - 1)
    writer.add_add_bos_token(False)


def model_tensors(
    workload: worker.LayerWorkload, layers: int, embedding: np.ndarray, gate: np.ndarray
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, values and, of experts, how many copies of so few there are; 0: fp32, as it is."""
    up, down = worker.make_experts(workload)
    hidden = workload.hidden
    rng = np.random.default_rng(workload.seed + 2)
    ones = np.ones(hidden, dtype=np.float32)
    attention_weight = rng.standard_normal((HEAD_DIM, hidden), dtype=np.float32) * np.float32(
        hidden**-0.5
    )
    yield "token_embd.weight", embedding, 0
    yield "output.weight", embedding * (LOGIT_SCALE / hidden), 0
    yield "output_norm.weight", ones, 0
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", ones, 0
        for name in ("attn_q", "attn_k", "attn_v"):
            yield f"blk.{layer}.{name}.weight", attention_weight, 0
        for name in ("attn_q_norm", "attn_k_norm"):
            yield f"blk.{layer}.{name}.weight", np.ones(HEAD_DIM, dtype=np.float32), 0
        yield f"blk.{layer}.attn_output.weight", np.zeros((hidden, HEAD_DIM), dtype=np.float32), 0
        yield f"blk.{layer}.ffn_gate_inp.weight", gate, 0
        yield f"blk.{layer}.ffn_gate_exps.weight", up[:, : workload.width], workload.experts
        yield f"blk.{layer}.ffn_up_exps.weight", up[:, workload.width :], workload.experts
        yield f"blk.{layer}.ffn_down_exps.weight", down * np.float32(EXPERT_SCALE), workload.experts


def start_server(path: Path, workload: worker.LayerWorkload, tokens: int):
    """llama.cpp's server over a model, with prompt batches of ``tokens``."""
    xllamacpp = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_batch, params.n_ubatch = 4 * tokens, tokens, tokens
    params.n_parallel, params.n_gpu_layers, params.warmup = 1, 0, False
    params.cache_prompt, params.cache_ram_mib, params.ctx_shift = False, 0, False
    for cores in (params.cpuparams, params.cpuparams_batch):
        cores.n_threads = workload.threads
        cores.poll = 0  # threads that spin after their work would slow whoever comes next
    return xllamacpp.Server(params)


def prompt_seconds(server, prompt: list[int]) -> float:
    """Of one prompt, as the server itself counts them."""
    request = {"prompt": prompt, "n_predict": 1, "cache_prompt": False, "temperature": 0.0}
    response = server.handle_completions(request)
    response = json.loads(response) if isinstance(response, str) else response
    if response["timings"]["prompt_n"] != len(prompt):
        raise ValueError(f"llama.cpp computed {response['timings']['prompt_n']} tokens of a prompt")
    return response["timings"]["prompt_ms"] / 1e3


def prompt_logits(server, prompt: list[int], vocabulary: int) -> np.ndarray:
    """[V] of the prompt's last token, up to a constant."""
    request = {"prompt": prompt, "n_predict": 1, "cache_prompt": False, "temperature": 0.0}
    response = server.handle_completions({**request, "n_probs": vocabulary})
    response = json.loads(response) if isinstance(response, str) else response
    values = np.full(vocabulary, np.nan, dtype=np.float32)
    for entry in response["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        values[entry["id"]] = entry["logprob"]
    return values


if __name__ == "__main__":
    worker.BASELINES = {"llama.cpp": start_baseline}
    sys.exit(worker.main())
