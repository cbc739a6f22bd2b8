"""End to end: a Kimi Linear model of real size with random weights, and where the time of one of its KDA layers goes.

    python benchmarks/model.py                        48B: prefill, decode, peak memory, and one layer (an H200: 98 GB of weights)
    python benchmarks/model.py --layer                one KDA layer of it alone, with the breakdown
    python benchmarks/model.py --preset small         a model that runs anywhere, also on a CPU
    python benchmarks/model.py --report RECORD.json   table and plot of a record
    python benchmarks/model.py --check                does the record speak of these sources, and is it whole?

Arms: `none` (transformers' PyTorch code), `fla` (what transformers runs by itself where FLA is installed) and `flash_kda`
(`flash_kda.replace_layers`). All run on one model, whose functions are exchanged. The record is written after every row, so
a run that is cut keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import record as records
import torch
from console import number, say, table
from peers import load_ours
from timing import spread

ARMS = ("none", "fla", "flash_kda")
PREFILL = (2048, 8192, 32768, 131072)
DECODE = (1, 8, 32)
LAYER_PREFILL = (2048, 8192, 32768)
PROMPT = 128  # tokens a sequence has before its decode steps are timed
STEPS = 8  # decode steps of a sample of a model; a layer's sample has eight times as many
NONE_TOKENS = 8192  # the longest prefill without kernels; 32768 tokens do not fit
COMPILERS = 6  # processes that compile FLA's kernels
SAMPLE_SECONDS = 2.5  # after as much, a time has samples enough if it has two
WARM_UP = 8, 0.3  # calls before the first sample, slow in Python; and seconds after which fewer are enough
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


class Arms:
    """The arms of a model or a layer: which functions its modules call."""

    # What FLA and a package for the convolution replace in transformers' code, at import.
    FUNCTIONS = (
        "chunk_kimi_delta_attention",
        "recurrent_kimi_delta_attention",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    )

    def __init__(self, device: torch.device):
        from transformers.models.kimi_linear import modeling_kimi_linear

        self.code, self.ours = modeling_kimi_linear, load_ours(device)
        self.functions = {"fla": {name: getattr(self.code, name) for name in self.FUNCTIONS}}
        self.functions["none"] = self.functions["flash_kda"] = self._without_fla()

    def _without_fla(self) -> dict:
        """The functions of transformers' code loaded once more, as where FLA is not installed."""
        name = f"{self.code.__name__}_without_fla"
        spec = importlib.util.spec_from_file_location(name, self.code.__file__)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        hidden = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "fla"}
        sys.modules["fla"] = None  # `import fla` fails
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules["fla"]
            sys.modules.update(hidden)
        return {name: getattr(module, name) for name in self.FUNCTIONS}

    @contextlib.contextmanager
    def run(self, arm: str, module: torch.nn.Module):
        """`module` with the functions of an arm."""
        vars(self.code).update(self.functions[arm])
        if arm == "flash_kda":
            replaced = self.ours.replace_layers(module)
            assert replaced and all(replaced.values()), replaced
        try:
            yield
        finally:
            self.ours.restore_layers(module)


def compile_fla(options) -> None:
    """Fill Triton's disk cache with this process's share of the configurations that FLA may choose from, timing none: minutes
    in all, so in several processes, while other arms are measured."""
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    def run_once(kernel, **_):
        kernel()
        torch.cuda.synchronize()
        return [0.0, 0.0, 0.0]

    every = Autotuner.prune_configs

    def share(self, kwargs):
        configs = every(self, kwargs)
        return configs[options.compile_fla :: COMPILERS] or configs[:1]

    triton.testing.do_bench, Autotuner.prune_configs = run_once, share
    os.environ["FLA_CACHE_RESULTS"] = "0"  # what it chooses here is no measurement
    layer, config = make_layer(options), config_of(options)
    x = torch.randn(1, 2048, config.hidden_size, device=options.device, dtype=options.dtype)
    cache = new_cache(config)
    for tokens in (x, x[:, :1]):
        layer(tokens, cache_params=cache)
    torch.cuda.synchronize()


def make_layer(options) -> torch.nn.Module:
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = config_of(options)
    layer = build(lambda: KimiLinearDeltaAttention(config, 0), options.device, options.dtype)
    layer.conv1d.weight.normal_(std=0.5)
    return layer


def new_cache(config):
    from transformers import DynamicCache

    return DynamicCache(config=config)


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

    def samples(self, call, inner: int = 1) -> list[float]:
        """Up to `repeats` samples, fewer of a slow call."""
        calls, seconds = WARM_UP
        start = time.perf_counter()
        for _ in range(calls):
            call()
            self.wait()
            if time.perf_counter() - start > seconds:
                break
        gc.collect()
        gc.disable()
        try:
            found, start = [], time.perf_counter()
            while len(found) < self.repeats and (len(found) < 2 or time.perf_counter() - start < SAMPLE_SECONDS):
                found.append(self.ms(call, inner))
        finally:
            gc.enable()
        return found

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
        row = work(row)
    except torch.OutOfMemoryError:
        row |= {"ms": None, "ms_spread": None, "extra_bytes": None}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def layer_rows(layer, arm: str, options):
    """One KDA layer: prefill, and a one-token step with its cache."""
    config, clock = config_of(options), Clock(options.device, options.repeats)
    weights = sum(p.numel() * p.element_size() for p in layer.parameters())

    def hidden(B, T):
        return torch.randn(B, T, config.hidden_size, device=options.device, dtype=options.dtype)

    def projections(x):
        q = layer.q_proj(x)
        layer.k_proj(x), layer.v_proj(x), layer.b_proj(x)
        layer.forget_gate.f_b_proj(layer.forget_gate.f_a_proj(x)), layer.g_b_proj(layer.g_a_proj(x))
        return layer.o_proj(q)

    def prefill(row):
        x = hidden(1, row["T"])
        measured(row, clock, lambda: layer(x))
        row["projections_ms"] = statistics.median(clock.samples(lambda: projections(x)))
        row["gpu"], row["kernels"] = clock.kernels(lambda: layer(x))
        return row

    def decode(row):
        B, steps = row["B"], 8 * STEPS
        cache = new_cache(config)
        layer(hidden(B, 64), cache_params=cache)
        x = hidden(B, 1)
        step = lambda: layer(x, cache_params=cache)  # noqa: E731
        measured(row, clock, step, steps)
        row["projections_ms"] = statistics.median(clock.samples(lambda: projections(x), steps))
        row["gpu"], row["kernels"] = clock.kernels(step)
        state = cache.layers[0].recurrent_states[0]
        row["bytes"] = weights + 2 * state.numel() * state.element_size()
        row["graph_ms"] = clock.graph_ms(step)
        return row

    common = {"arm": arm, "model": options.preset}
    for what, B, T in options.layer_shapes:
        yield or_out_of_memory(common | {"what": what, "B": B, "T": T}, prefill if what == "layer prefill" else decode)


def model_rows(model, arm: str, options):
    """The whole model: prefill with a cache, logits of the last token alone; decode steps after a short prompt."""
    config, clock = config_of(options), Clock(options.device, options.repeats)

    def ids(B, T):
        return torch.randint(3, config.vocab_size - 12, (B, T), device=options.device)

    def prefill(row):
        tokens = ids(row["B"], row["T"])
        return measured(row, clock, lambda: model(tokens, use_cache=True, logits_to_keep=1))

    def decode(row):
        cache = model(ids(row["B"], PROMPT), use_cache=True, logits_to_keep=1).past_key_values
        token = ids(row["B"], 1)
        return measured(row, clock, lambda: model(token, past_key_values=cache, use_cache=True), STEPS)

    common = {"arm": arm, "model": options.preset}
    for what, B, T in options.model_shapes:
        if arm != "none" or T <= NONE_TOKENS:
            yield or_out_of_memory(common | {"what": what, "B": B, "T": T}, prefill if what == "prefill" else decode)


def all_rows(options):
    """Row by row, arm by arm: FLA last, whose kernels other processes compile meanwhile."""
    from transformers import KimiLinearForCausalLM

    order = [arm for arm in ARMS if arm in options.arms]
    with fla_compilers(options) if "fla" in order else contextlib.nullcontext() as compilers:
        arms, layer, model = Arms(options.device), make_layer(options), None
        if not options.layer:
            start = time.perf_counter()
            model = build(lambda: KimiLinearForCausalLM(config_of(options)), options.device, options.dtype)
            Clock(options.device, 1).wait()
            say(f"model built in {time.perf_counter() - start:.0f} s")
        for arm in order:
            if arm == "fla":
                for process in compilers:
                    process.wait()
                tune_fla(arms, layer, options)
            with arms.run(arm, layer):
                yield from layer_rows(layer, arm, options)
            if model is not None:
                with arms.run(arm, model):
                    yield from model_rows(model, arm, options)


@contextlib.contextmanager
def fla_compilers(options):
    """The processes that compile FLA's kernels; they do not outlive the measurement."""
    command = [sys.executable, __file__, "--preset", options.preset, "--compile-fla"]
    processes = [subprocess.Popen([*command, str(i)]) for i in range(COMPILERS)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def tune_fla(arms: Arms, layer, options) -> None:
    """Let FLA choose its configurations at 8192 tokens: it keeps what it finds at the first length that it meets."""
    import triton.testing

    triton.testing.do_bench = partial(triton.testing.do_bench, warmup=5, rep=25)
    with arms.run("fla", layer):
        layer(torch.randn(1, 8192, config_of(options).hidden_size, device=options.device, dtype=options.dtype))


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


def problems(record: dict) -> list[str]:
    """What a record of the whole 48B run lacks, in plain sentences."""
    found = [f"meta.{key} is missing" for key in records.META if key not in record.get("meta", {})]
    rows = {(row["arm"], row["what"], row["B"], row["T"]): row for row in record.get("rows", [])}
    for arm in ARMS:
        for shape in shapes(LAYER_PREFILL, DECODE, "layer ") + shapes(PREFILL, DECODE):
            what, B, T = shape
            if arm == "none" and T > NONE_TOKENS and what == "prefill":
                continue
            row = rows.get((arm, *shape))
            if row is None:
                found.append(f"{arm} {what} B = {B}, T = {T} is missing")
            elif arm == "flash_kda" and row["ms"] is None:
                found.append(f"{arm} {what} B = {B}, T = {T} ran out of memory")
    return found


def check(path: Path) -> list[str]:
    """Why the record does not speak of these sources; empty when it does."""
    if not path.is_file():
        return ["there is no record; make one on a GPU with: python benchmarks/model.py"]
    record = json.loads(path.read_text())
    found = problems(record)
    if not found and record["meta"]["source_digest"] != records.source_digest():
        found = [f"the sources changed since {record['meta']['date']}"]
    return found


def shapes(tokens, batches, prefix: str = "") -> list[tuple[str, int, int]]:
    """`(what, B, T)` of the rows of an arm."""
    return [(f"{prefix}prefill", 1, T) for T in tokens] + [(f"{prefix}decode", B, 1) for B in batches]


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("48b", "small"), default="48b")
    parser.add_argument("--layer", action="store_true", help="one KDA layer only")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all whose packages are here")
    parser.add_argument("--tokens", nargs="*", type=int, help=f"prefill lengths (default {PREFILL}; small: 512 2048)")
    parser.add_argument(
        "--layer-tokens", nargs="*", type=int, help=f"of one layer (default {LAYER_PREFILL}; small: 512)"
    )
    parser.add_argument("--batches", nargs="*", type=int, help=f"decode batches (default {DECODE}; small: 1 4)")
    parser.add_argument("--repeats", type=int, default=5, help="samples a time, fewer of slow calls (default 5)")
    parser.add_argument(
        "--out", type=Path, help="folder of the record (default benchmarks/results for the whole 48b run)"
    )
    parser.add_argument("--report", type=Path, metavar="JSON", help="table and plot of a record, nothing measured")
    parser.add_argument(
        "--check", nargs="?", type=Path, metavar="JSON", const=records.RESULTS / "h200-model.json",
        help="does a record (default benchmarks/results/h200-model.json) speak of these sources? nothing measured",
    )  # fmt: skip
    parser.add_argument("--compile-fla", type=int, help=argparse.SUPPRESS)  # a process of its own: which share
    options = parser.parse_args(argv)
    small, given = options.preset == "small", (options.tokens, options.layer_tokens, options.batches)
    options.whole = not (small or options.layer or options.arms or any(x is not None for x in given))
    tokens, layer_tokens, batches = (
        default if x is None else x
        for x, default in zip(given, ((512, 2048), (512,), (1, 4)) if small else (PREFILL, LAYER_PREFILL, DECODE))
    )
    options.model_shapes = shapes(tokens, batches)
    options.layer_shapes = shapes(layer_tokens, batches, "layer ")
    options.has_fla = options.device.type == "cuda" and importlib.util.find_spec("fla") is not None
    options.arms = options.arms or [arm for arm in ARMS if arm != "fla" or options.has_fla]
    options.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    if "fla" in options.arms and not options.has_fla:
        parser.error("the arm fla needs FLA (pip install fla-core==0.6.0) and a GPU")
    measures = not (options.report or options.check)
    if options.preset == "48b" and options.device.type != "cuda" and not options.layer and measures:
        parser.error("the 48b model needs a GPU with 110 GB; --preset small runs anywhere, --layer wherever torch does")
    return options


def measure(options) -> int:
    from prefill import environment, round_significant

    meta = environment(options.device, metadata.version("fla-core") if options.has_fla else None)
    meta |= {
        "tests": None,
        "repeats": options.repeats,
        "transformers": metadata.version("transformers"),
        "copy_bytes_per_ms": copy_bandwidth(options.device),
    }
    folder = options.out or (records.RESULTS if options.whole else None)
    rows, path = [], None
    for row in all_rows(options):
        rows.append({key: _rounded(value, round_significant) for key, value in row.items()})
        say(line(rows[-1]))
        if folder is not None:
            path = records.write({"meta": meta, "rows": rows}, folder, suffix="model")
    print(f"\n{meta['gpu']}, torch {meta['torch']}, transformers {meta['transformers']}, {options.preset}\n")
    print("\n\n".join(filter(None, (model_table(rows), layer_table(rows)))))
    if path is not None:
        say(f"wrote {path}")
    return 0


def main(argv=None) -> int:
    options = parse(argv)
    if options.report:
        rows = json.loads(options.report.read_text())["rows"]
        print(f"{model_table(rows)}\n\n{layer_table(rows)}")
        plot(rows, options.report.with_suffix(".svg"))
        return 0
    if options.check:
        found = check(options.check)
        print("\n".join(found) or f"{options.check.name} speaks of these sources and is whole")
        return bool(found)
    os.environ["FLA_FLASH_KDA"] = "0"  # FLA hands calls to an importable flash_kda; the arm is FLA itself
    with torch.no_grad():
        if options.compile_fla is not None:
            compile_fla(options)
            return 0
        return measure(options)


def _rounded(value, to):
    return {key: to(x) for key, x in value.items()} if isinstance(value, dict) else to(value)


if __name__ == "__main__":
    sys.exit(main())
