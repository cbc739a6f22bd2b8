"""End to end: a Kimi Linear model of real size with random weights, and where the time of one of its KDA layers goes.

    python benchmarks/model.py                        48B: prefill, decode, peak memory, and one layer (an H200: 98 GB of weights)
    python benchmarks/model.py --layer                one KDA layer of it alone, with the breakdown
    python benchmarks/model.py --preset small         a model that runs anywhere, also on a CPU
    python benchmarks/model.py --report RECORD.json   table and plot of a record

Arms: `none` (transformers' PyTorch code), `fla` (what transformers runs by itself where FLA is installed) and `flash_kda`
(`flash_kda.replace_layers`). Each arm has a process of its own, because transformers decides at import.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record as records
import torch
from console import number, say, table
from timing import spread

ARMS = ("none", "fla", "flash_kda")
PREFILL = (2048, 8192, 32768, 131072)
DECODE = (1, 8, 32)
LAYER_PREFILL = (2048, 8192, 32768)
PROMPT = 128  # tokens a sequence has before its decode steps are timed
STEPS = 16  # decode steps of a sample of a model; a layer's sample has four times as many
SMALL = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    num_attention_heads=4,
    num_key_value_heads=4,
    num_local_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    linear_head_dim=128,
    linear_num_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

# GPU kernels by what they belong to: the first word decides that a kernel's name has.
WORDS = {
    "linears_kernel": "projections",
    "linear_vector": "projections",
    "conv": "conv",
    "norm": "norm",
    **dict.fromkeys(("kda", "chunk", "recurrent", "solve_tril", "cumsum"), "kda"),
    **dict.fromkeys(("gemm", "nvjet", "gemv", "cublas", "splitk", "cutlass"), "projections"),
}
PARTS = ("projections", "conv", "norm", "kda")


def part_of(kernel: str) -> str:
    name = kernel.lower()
    return next((part for word, part in WORDS.items() if word in name), "other")


# --- the model ----------------------------------------------------------------------------------------------------------


def fill(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights drawn where they lie, of the sizes that the family's own initialisation gives them."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith("A_log"):
                weight.uniform_(1, 16, generator=generator).log_()
            elif name.endswith("dt_bias"):
                step = torch.empty_like(weight, dtype=torch.float32).uniform_(-6.9, -2.3, generator=generator).exp_()
                weight.copy_(step.expm1().log())
            elif weight.dim() == 1:
                weight.fill_(1)
            else:
                weight.normal_(std=0.02, generator=generator)
        for buffer in module.buffers():
            buffer.zero_()  # the routers' corrections


def build(make, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A module built without memory and then allocated on the device: 48B take seconds."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            module = make()
    finally:
        torch.set_default_dtype(default)
    module = module.to_empty(device=device).eval()
    fill(module)
    return module


def config_of(options):
    from transformers import KimiLinearConfig

    config = KimiLinearConfig(**(SMALL if options.preset == "small" else {}))
    config._experts_implementation = "grouped_mm" if options.device.type == "cuda" else "eager"
    config._attn_implementation = "sdpa"
    return config


def install(module: torch.nn.Module, options) -> None:
    """The arm's kernels; `none` and `fla` are what transformers does by itself in this process."""
    if options.arm == "flash_kda":
        from peers import load_ours

        replaced = load_ours(options.device).replace_layers(module)
        assert replaced and all(replaced.values()), replaced


# --- measuring ----------------------------------------------------------------------------------------------------------


class Clock:
    """Times and memory of calls on one device."""

    def __init__(self, device: torch.device, repeats: int):
        self.device, self.cuda, self.repeats = device, device.type == "cuda", repeats

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, call, inner: int = 1) -> float:
        """Milliseconds a call, `inner` calls in a row: by events on a GPU, whose queue is empty at the start."""
        self.wait()
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(inner):
                call()
            return (time.perf_counter() - start) * 1e3 / inner
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / inner

    def samples(self, call, inner: int = 1, warm: int = 2) -> list[float]:
        for _ in range(warm):
            call()
        gc.collect()
        gc.disable()
        try:
            return [self.ms(call, inner) for _ in range(self.repeats)]
        finally:
            gc.enable()

    def extra_bytes(self, call) -> int | None:
        """What a call needs at its peak beside what was there before."""
        if not self.cuda:
            return None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, call) -> tuple[dict[str, float], int] | tuple[None, None]:
        """GPU milliseconds of a call by what the kernels belong to, and how many there are."""
        if not self.cuda:
            return None, None
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        found = dict.fromkeys((*PARTS, "other"), 0.0)
        count = 0
        for event in profile.events():
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            found[part_of(event.name)] += event.device_time_total / 1e3
            count += 1
        return found, count

    def graph_ms(self, call) -> float | None:
        """Milliseconds of a replay of the call captured in a CUDA graph; None where it cannot be captured."""
        if not self.cuda:
            return None
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        except Exception as error:
            say(f"  not captured in a graph: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
            return None
        return statistics.median(self.samples(graph.replay, 20))


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes a millisecond that a large copy reads and writes."""
    if device.type != "cuda":
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device, 5)
    return 2 * source.numel() / statistics.median(clock.samples(lambda: target.copy_(source)))


def measured(row: dict, clock: Clock, call, inner: int = 1) -> dict:
    samples = clock.samples(call, inner)
    row |= {"ms": statistics.median(samples), "ms_spread": spread(samples), "extra_bytes": clock.extra_bytes(call)}
    return row


def or_out_of_memory(row: dict, work) -> dict:
    """A row that did not fit has no time."""
    try:
        return work(row)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return row | {"ms": None, "ms_spread": None, "extra_bytes": None}


def layer_rows(options) -> list[dict]:
    """One KDA layer: prefill, and a one-token step with its cache."""
    from transformers import DynamicCache
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = config_of(options)
    layer = build(lambda: KimiLinearDeltaAttention(config, 0), options.device, options.dtype)
    with torch.no_grad():
        layer.conv1d.weight.normal_(std=0.5)
    install(layer, options)
    clock, rows = Clock(options.device, options.repeats), []
    weights = sum(p.numel() * p.element_size() for p in layer.parameters())

    def projections(x):
        q = layer.q_proj(x)
        layer.k_proj(x), layer.v_proj(x), layer.b_proj(x)
        layer.forget_gate.f_b_proj(layer.forget_gate.f_a_proj(x)), layer.g_b_proj(layer.g_a_proj(x))
        return layer.o_proj(q)

    def prefill(row):
        x = torch.randn(1, row["T"], config.hidden_size, device=options.device, dtype=options.dtype)
        measured(row, clock, lambda: layer(x))
        row["projections_ms"] = statistics.median(clock.samples(lambda: projections(x)))
        row["gpu"], row["kernels"] = clock.kernels(lambda: layer(x))
        return row

    def decode(row):
        B, steps = row["B"], 4 * STEPS
        cache = DynamicCache(config=config)
        layer(torch.randn(B, 64, config.hidden_size, device=options.device, dtype=options.dtype), cache_params=cache)
        x = torch.randn(B, 1, config.hidden_size, device=options.device, dtype=options.dtype)
        step = lambda: layer(x, cache_params=cache)  # noqa: E731
        measured(row, clock, step, steps)
        row["projections_ms"] = statistics.median(clock.samples(lambda: projections(x), steps))
        row["gpu"], row["kernels"] = clock.kernels(step)
        state = cache.layers[0].recurrent_states[0]
        row["bytes"] = weights + 2 * state.numel() * state.element_size()
        row["graph_ms"] = clock.graph_ms(step)
        return row

    common = {"arm": options.arm, "model": options.preset}
    for T in options.layer_tokens:
        rows.append(or_out_of_memory(common | {"what": "layer prefill", "B": 1, "T": T}, prefill))
        say(line(rows[-1]))
    for B in options.batches:
        rows.append(or_out_of_memory(common | {"what": "layer decode", "B": B, "T": 1}, decode))
        say(line(rows[-1]))
    return rows


def model_rows(options) -> list[dict]:
    """The whole model: prefill with a cache, logits of the last token alone; decode steps after a short prompt."""
    from transformers import KimiLinearForCausalLM

    config, start = config_of(options), time.perf_counter()
    model = build(lambda: KimiLinearForCausalLM(config), options.device, options.dtype)
    install(model, options)
    clock, rows = Clock(options.device, options.repeats), []
    clock.wait()
    say(f"{options.arm}: built in {time.perf_counter() - start:.0f} s")

    def ids(B, T):
        return torch.randint(
            3, config.vocab_size - 1000 if options.preset == "48b" else 500, (B, T), device=options.device
        )

    def prefill(row):
        tokens = ids(row["B"], row["T"])
        return measured(row, clock, lambda: model(tokens, use_cache=True, logits_to_keep=1))

    def decode(row):
        cache = model(ids(row["B"], PROMPT), use_cache=True, logits_to_keep=1).past_key_values
        token = ids(row["B"], 1)
        return measured(row, clock, lambda: model(token, past_key_values=cache, use_cache=True), STEPS)

    common = {"arm": options.arm, "model": options.preset}
    for T in options.tokens:
        rows.append(or_out_of_memory(common | {"what": "prefill", "B": 1, "T": T}, prefill))
        say(line(rows[-1]))
    for B in options.batches:
        rows.append(or_out_of_memory(common | {"what": "decode", "B": B, "T": 1}, decode))
        say(line(rows[-1]))
    return rows


def run_arm(options) -> None:
    """One arm, in this process; its rows go to a file."""
    if options.arm == "none":
        sys.modules["fla"] = None  # whatever is installed: `import fla` fails
    elif options.arm == "fla":
        os.environ["FLA_FLASH_KDA"] = "0"  # FLA hands calls to an importable flash_kda; the arm is FLA itself
        import fla  # noqa: F401
    with torch.no_grad():
        rows = layer_rows(options)
        if not options.layer:
            gc.collect()
            rows += model_rows(options)
    options.rows.write_text(json.dumps(rows))


# --- the record ---------------------------------------------------------------------------------------------------------


def line(row: dict) -> str:
    size = f"{row['T']} tokens" if "prefill" in row["what"] else f"B = {row['B']}"
    return f"{row['arm']} {row['what']} {size}: {number(row['ms'])} ms"


def gigabytes(value: int | None) -> str:
    return number(None if value is None else value / 1e9)


def model_table(rows: list[dict]) -> str:
    """Times of the whole model, one column an arm."""
    shapes = list(dict.fromkeys((r["what"], r["B"], r["T"]) for r in rows if not r["what"].startswith("layer")))
    found = {(r["what"], r["B"], r["T"], r["arm"]): r for r in rows}
    arms = [arm for arm in ARMS if any(r["arm"] == arm for r in rows)]
    lines = []
    for what, B, T in shapes:
        cells = [found.get((what, B, T, arm), {}) for arm in arms]
        lines.append(
            [what, f"{T} tokens" if what == "prefill" else f"B = {B}"]
            + [number(cell.get("ms")) for cell in cells]
            + [gigabytes(cell.get("extra_bytes")) for cell in cells]
        )
    return table(["", "", *[f"{arm} ms" for arm in arms], *[f"{arm} GB" for arm in arms]], lines) if lines else ""


def layer_table(rows: list[dict]) -> str:
    """One layer: whole and beside its projections, and GPU time by part."""
    lines = []
    for row in rows:
        if row["what"].startswith("layer"):
            size = f"{row['T']} tokens" if "prefill" in row["what"] else f"B = {row['B']}"
            gpu = row.get("gpu") or {}
            rest = None if row["ms"] is None else row["ms"] - row["projections_ms"]
            lines.append(
                [row["arm"], f"{row['what'].removeprefix('layer ')} {size}", number(row["ms"]), number(rest)]
                + [number(gpu.get(part), 4) for part in (*PARTS, "other")]
                + [number(row.get("graph_ms"), 4), str(row.get("kernels") or "–"), gigabytes(row["extra_bytes"])]
            )
    headers = ["arm", "", "ms", "beside projections", *PARTS, "other", "graph", "kernels", "extra GB"]
    return table(headers, lines) if lines else ""


def plot(rows: list[dict], path: Path) -> None:
    """Where the GPU time of one layer goes, one bar an arm and shape."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "flash-kda", "svg.fonttype": "none", "font.size": 9})
    shown = [row for row in rows if row["what"] == "layer prefill" and row.get("gpu")]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(shown) + 1.6), layout="constrained")
    colors = ("#edae49", "#00798c", "#d1495b", "#30638e", "0.75")
    left = [0.0] * len(shown)
    for part, color in zip((*PARTS, "other"), colors):
        share = [row["gpu"][part] / row["T"] * 8192 for row in shown]
        axes.barh(range(len(shown)), share, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, share)]
    axes.set_yticks(range(len(shown)), [f"{row['arm']} {row['T']}" for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("GPU milliseconds for 8192 tokens, one KDA layer")
    figure.legend(ncols=5, fontsize=8, loc="outside lower center", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("48b", "small"), default="48b")
    parser.add_argument("--layer", action="store_true", help="one KDA layer only")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all whose packages are here")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"prefill lengths (default {PREFILL}; small: 512 2048)")
    parser.add_argument(
        "--layer-tokens", nargs="+", type=int, help=f"of one layer (default {LAYER_PREFILL}; small: 512)"
    )
    parser.add_argument("--batches", nargs="*", type=int, help=f"decode batches (default {DECODE}; small: 1 4)")
    parser.add_argument("--repeats", type=int, default=5, help="samples a time (default 5)")
    parser.add_argument(
        "--out", type=Path, help="folder of the record (default benchmarks/results for the whole 48b run)"
    )
    parser.add_argument("--report", type=Path, metavar="JSON", help="table and plot of a record, nothing measured")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    small = options.preset == "small"
    options.whole = not (
        small or options.layer or options.tokens or options.layer_tokens or options.batches or options.arms
    )
    options.tokens = options.tokens or ((512, 2048) if small else PREFILL)
    options.layer_tokens = options.layer_tokens or ((512,) if small else LAYER_PREFILL)
    options.batches = options.batches if options.batches is not None else ((1, 4) if small else DECODE)
    options.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    if options.preset == "48b" and options.device.type != "cuda" and not options.layer and not options.report:
        parser.error("the 48b model needs a GPU with 110 GB; --preset small runs anywhere, --layer wherever torch does")
    return options


def main(argv=None) -> int:
    options = parse(argv)
    if options.report:
        rows = json.loads(options.report.read_text())["rows"]
        print(f"{model_table(rows)}\n\n{layer_table(rows)}")
        plot(rows, options.report.with_suffix(".svg"))
        return 0
    if options.arm:
        run_arm(options)
        return 0

    from importlib import metadata, util

    from prefill import environment, round_significant

    has_fla = options.device.type == "cuda" and util.find_spec("fla") is not None
    arms = options.arms or [arm for arm in ARMS if arm != "fla" or has_fla]
    rows = []
    arguments = sys.argv[1:] if argv is None else [str(a) for a in argv]
    for arm in arms:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, __file__, *arguments, "--arm", arm, "--rows", str(file)]
            done = subprocess.run(command, check=False)
            if done.returncode or not file.is_file():
                say(f"{arm}: failed with {done.returncode}")
                return 1
            rows += json.loads(file.read_text())
    meta = environment(options.device, metadata.version("fla-core") if has_fla else None)
    meta |= {
        "tests": None,
        "repeats": options.repeats,
        "transformers": metadata.version("transformers"),
        "copy_bytes_per_ms": copy_bandwidth(options.device),
    }
    rows = [{key: _rounded(value, round_significant) for key, value in row.items()} for row in rows]
    print(f"\n{meta['gpu']}, torch {meta['torch']}, transformers {meta['transformers']}, {options.preset}\n")
    print("\n\n".join(filter(None, (model_table(rows), layer_table(rows)))))
    if options.whole or options.out:
        folder = options.out or records.RESULTS
        path = records.write({"meta": meta, "rows": rows}, folder, suffix="model")
        say(f"wrote {path}")
    return 0


def _rounded(value, to):
    return {key: to(x) for key, x in value.items()} if isinstance(value, dict) else to(value)


if __name__ == "__main__":
    sys.exit(main())
