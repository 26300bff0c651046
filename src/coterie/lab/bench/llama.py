"""The worker process of llama.cpp: random models of one shape, through xllamacpp.

llama.cpp computes a single token in its last layer. So the time of a layer is the difference
between a model of two layers and one of one layer, for the same prompt. The output of attention is
zero, so a token's hidden state is its embedding. Router gates are solved for, so that every layer
selects the experts of a case with its weights.
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
else:  # run as a script, where the package is not installed
    import worker

HEAD_DIM = 64  # features of the single head
GATE_LOGIT = 24.0  # logit of a selected expert of weight 1; those not selected have 0
EXPERT_SCALE = 0.05  # scale of the experts' output, so that it does not affect the next router
LOGIT_SCALE = np.float32(8)  # a larger scale would hide all logits but the token's own
GGUF_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def start_baseline(
    folder: Path, workload: worker.LayerWorkload, cases: list[worker.TimedCase]
) -> worker.BaselineRunner:
    """Writes and loads the two models."""
    tokens = [token for case in cases for token in range(len(case.ids))]
    if len(tokens) > workload.hidden // 2:
        raise ValueError(f"{len(tokens)} tokens are too many for {workload.hidden} features")
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
    return worker.BaselineRunner(("layer",), seconds, error, packages)


def make_embeddings(workload: worker.LayerWorkload, count: int) -> np.ndarray:
    """[count, H] fp32 rows with a root mean square of 1, which a norm does not change."""
    rng = np.random.default_rng(workload.seed + 1)
    rows = rng.standard_normal((count, workload.hidden), dtype=np.float32)
    return rows / np.sqrt((rows**2).mean(axis=1, keepdims=True))


def make_gate(embedding: np.ndarray, cases: list[worker.TimedCase], experts: int) -> np.ndarray:
    """A gate [E, H] that selects the experts of every case's tokens, with its weights.

    Logits are far above 0 at a token's experts and 0 elsewhere; the softmax over the selected ones
    gives the weights.
    """
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
    """The layer's output for a token x [H], in fp32, with normalized weights as in Qwen3-MoE."""
    up, down = worker.make_experts(workload)
    out = np.zeros_like(x)
    experts = ids % worker.DISTINCT_EXPERTS
    for expert, expert_weight in zip(experts, weights / weights.sum(), strict=True):
        gate, value = np.split(up[expert] @ x, 2)
        out += expert_weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * value))
    return out * np.float32(EXPERT_SCALE)


def relative_error(
    actual: np.ndarray, embedding: np.ndarray, last: int, expert_delta: np.ndarray
) -> float:
    """The error of logits [V] of token ``last`` after one layer, relative to the layer's effect.

    Logits are centred, since a softmax ignores a common offset.
    """

    def output_logits(x: np.ndarray) -> np.ndarray:
        centred = embedding @ (x / np.sqrt((x**2).mean())) * (LOGIT_SCALE / len(x))
        return centred - centred.mean()

    expected = output_logits(embedding[last] + expert_delta)
    without_layer = output_logits(embedding[last])
    deviation = actual - actual.mean() - expected
    return float(np.linalg.norm(deviation) / np.linalg.norm(expected - without_layer))


def write_model(
    path: Path, workload: worker.LayerWorkload, layers: int, embedding: np.ndarray, gate: np.ndarray
) -> None:
    """Writes a Qwen3-MoE with random weights, one matrix at a time: a layer may have gigabytes."""
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
    """Writes the model's sizes and a vocabulary of numbers."""
    metadata: dict[str, object] = {"block_count": layers, "context_length": 512}
    metadata |= {"embedding_length": workload.hidden, "feed_forward_length": workload.width}
    metadata |= {"expert_feed_forward_length": workload.width, "expert_count": workload.experts}
    metadata |= {"expert_used_count": workload.k, "head_count": 1, "head_count_kv": 1}
    metadata |= {"key_length": HEAD_DIM, "value_length": HEAD_DIM, "layer_norm_rms_eps": 1e-6}
    metadata |= {"rope_freq_base": 10000.0, "vocab_size": vocabulary, "tokenizer_model": "gpt2"}
    metadata |= {"token_list": [f"t{token}" for token in range(vocabulary)]}
    metadata |= {"token_types": [1] * vocabulary, "token_merges": ["t 0"]}
    metadata |= {"eos_token_id": vocabulary - 1, "add_bos_token": False}
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)


def model_tensors(
    workload: worker.LayerWorkload, layers: int, embedding: np.ndarray, gate: np.ndarray
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, values and the number of copies of the experts; 0 for fp32 tensors."""
    up, down = worker.make_experts(workload)
    hidden = workload.hidden
    rng = np.random.default_rng(workload.seed + 2)
    ones = np.ones(hidden, dtype=np.float32)
    attention_weight = rng.standard_normal((HEAD_DIM, hidden), dtype=np.float32)
    attention_weight *= np.float32(hidden**-0.5)
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
    """Starts llama.cpp's server for a model, with prompt batches of ``tokens``."""
    xllamacpp = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_batch, params.n_ubatch = 4 * tokens, tokens, tokens
    params.n_parallel, params.n_gpu_layers, params.warmup = 1, 0, False
    params.cache_prompt, params.cache_ram_mib, params.ctx_shift = False, 0, False
    for cores in (params.cpuparams, params.cpuparams_batch):
        cores.n_threads = workload.threads
        cores.poll = 0  # spinning threads would slow the next kernel
    return xllamacpp.Server(params)


def prompt_seconds(server, prompt: list[int]) -> float:
    """Seconds of one prompt, as the server reports them."""
    response = _complete(server, prompt)
    if response["timings"]["prompt_n"] != len(prompt):
        raise ValueError(f"llama.cpp computed {response['timings']['prompt_n']} prompt tokens")
    return response["timings"]["prompt_ms"] / 1e3


def prompt_logits(server, prompt: list[int], vocabulary: int) -> np.ndarray:
    """Logits [V] of the prompt's last token, up to a constant."""
    response = _complete(server, prompt, n_probs=vocabulary)
    values = np.full(vocabulary, np.nan, dtype=np.float32)
    for entry in response["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        values[entry["id"]] = entry["logprob"]
    return values


def _complete(server, prompt: list[int], **options: int) -> dict:
    request = {"prompt": prompt, "n_predict": 1, "cache_prompt": False, "temperature": 0.0}
    response = server.handle_completions({**request, **options})
    return json.loads(response) if isinstance(response, str) else response


if __name__ == "__main__":
    worker.BASELINES = {"llama.cpp": start_baseline}
    sys.exit(worker.main())
