#!/usr/bin/env python3
"""Generate text with a Kimi Linear model, without and with the kernels of this package, and compare.

    python examples/generate.py                              small model, random weights: seconds, any machine
    python examples/generate.py --preset 48b                 Kimi-Linear-48B's real size, random weights (98 GB of GPU memory)
    python examples/generate.py --checkpoint DIR_OR_HUB_ID   real weights of any transformers model with KDA layers

The kernels come from build/ of this checkout (python tools/build.py makes it); --kernel names another directory or a
repository of the Hub. Random weights know no language: such a model's "text" is a salad of words, and only its speed and
its agreement with itself mean something.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
import zlib
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
console = Console(highlight=False)

WORDS = """
the a this that one two many every some no and or but so then when where while because until of in on at by to from
with under over into through between around before after river mountain valley forest garden field road bridge harbour
island city village house window door lamp table letter book song word story name voice child mother father friend
stranger king queen fisher baker captain doctor teacher horse bird fox wolf cat dog fish tree leaf stone sand water fire
wind rain snow cloud sun moon star night morning evening winter spring summer autumn year day hour is was are were has
had goes went comes came sees saw hears heard finds found keeps kept loses lost makes made takes took gives gave says
said asks asked tells told opens opened closes closed carries carried follows followed remembers remembered forgets
forgot sings sang sleeps slept waits waited runs ran walks walked falls fell rises rose old young small great long short
high low deep bright dark warm cold quiet loud slow quick green blue red white black golden silver empty full strange
simple gentle wild here there now again always never often almost only still away home together alone slowly softly
suddenly , . ; - ! ?
""".split()


class WordSalad:
    """The tokenizer of a model that never learned one: every id is some word, every word some id."""

    first = 3  # after padding, beginning and end

    def encode(self, text: str) -> list[int]:
        known = {word: i for i, word in enumerate(WORDS)}
        return [self.first + known.get(w, zlib.crc32(w.encode()) % len(WORDS)) for w in text.lower().split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[(i - self.first) % len(WORDS)] for i in ids)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--preset", choices=["small", "48b"], default="small", help="size of the random model (default: small)"
    )
    model.add_argument(
        "--checkpoint", metavar="DIR_OR_ID", help="load this transformers checkpoint instead of a preset"
    )
    model.add_argument("--device", help="default: cuda if there is one, else cpu")
    model.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    model.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", default="the old captain remembers a quiet harbour where", help="how the text begins")
    text.add_argument(
        "--prompt-tokens",
        type=int,
        default=512,
        metavar="N",
        help="repeat the prompt up to N tokens, so that its prefill can be timed; 0: as it is (default: 512)",
    )
    text.add_argument("--new-tokens", type=int, default=48, metavar="N", help="tokens to generate (default: 48)")
    text.add_argument("--batch", type=int, default=1, metavar="B", help="copies generated at once (default: 1)")
    kernel = parser.add_argument_group("kernels")
    kernel.add_argument(
        "--kernel",
        default=str(ROOT / "build"),
        metavar="DIR_OR_ID",
        help="build directory, or Hub repository as owner/name, whose code you then trust (default: build/)",
    )
    kernel.add_argument(
        "--only-kernels", action="store_true", help="leave out the run without kernels (at 48b it needs much memory)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    if args.new_tokens < 2 or args.batch < 1 or args.prompt_tokens < 0 or not args.prompt.strip():
        parser.error(
            "--new-tokens must be at least 2, --batch at least 1, --prompt-tokens not negative, --prompt not empty"
        )
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    return args


def load_kernel(where: str):
    import kernels

    if Path(where).is_dir():
        return kernels.get_local_kernel(Path(where).resolve())
    if where.count("/") == 1 and not where.startswith((".", "/")):
        return kernels.get_kernel(where, version=1, trust_remote_code=True)
    sys.exit(f"No build of the kernels at {where}. Make one:\n    {sys.executable} {ROOT / 'tools' / 'build.py'}")


def random_model(args: argparse.Namespace):
    """A Kimi Linear model with weights as transformers initialises them, allocated and drawn on the device itself."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig()  # the defaults are the 48B model
    if args.preset == "small":
        # 128 channels a KDA head, as in every released model: what the CUDA kernel takes.
        config = KimiLinearConfig(
            vocab_size=WordSalad.first + len(WORDS),
            hidden_size=256,
            intermediate_size=512,
            moe_intermediate_size=128,
            num_hidden_layers=4,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=4,
            num_experts_per_tok=4,  # all: a choice would flip by rounding, and random experts have nothing in common
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            linear_head_dim=128,
            linear_num_heads=4,
            initializer_range=0.1,  # at this width the usual .02 gives nearly equal logits, and one word for ever
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    with torch.device("meta"):
        model = KimiLinearForCausalLM._from_config(config, dtype=args.dtype)
    model.to_empty(device=args.device)
    torch.manual_seed(args.seed)
    model.init_weights()
    model.generation_config.eos_token_id = None  # every run generates as many tokens
    return model.eval(), WordSalad()


def load_model(args: argparse.Namespace):
    if not args.checkpoint:
        return random_model(args)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=args.dtype).to(args.device)
    return model.eval(), AutoTokenizer.from_pretrained(args.checkpoint)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TokenClock:
    """Notes when each token of a `generate` call is there; looks like a stopping criterion that never stops."""

    def __init__(self):
        self.times = []

    def __call__(self, ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        synchronize(ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


@torch.no_grad()
def generate(model, prompt: torch.Tensor, new_tokens: int, clock: TokenClock | None = None) -> torch.Tensor:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=[clock] if clock else None,
    )


def run(model, prompt: torch.Tensor, new_tokens: int) -> dict:
    """Generate greedily and time it: prefill ends with the first token, decode is the rest. In tokens per second."""
    generate(model, prompt, 2)  # warms caches, allocators and lazily loaded libraries
    clock = TokenClock()
    synchronize(prompt.device)
    start = time.perf_counter()
    ids = generate(model, prompt, new_tokens, clock)
    prefill, decode = clock.times[0] - start, clock.times[-1] - clock.times[0]
    return {"prefill": prompt.numel() / prefill, "decode": prompt.shape[0] * (new_tokens - 1) / decode, "ids": ids}


@torch.no_grad()
def logits_of(model, ids: torch.Tensor, last: int) -> torch.Tensor:
    return model(ids, use_cache=False, logits_to_keep=last).logits.float()


def install(kernel, model) -> dict[str, str]:
    """Put the kernels in. Returns which functions were replaced, and by what."""
    import kernels
    import transformers

    logging.getLogger("kernels").setLevel(logging.ERROR)  # it warns of each function that the mapping does not name
    with kernels.use_kernel_mapping(kernel.kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE)
    functions = kernel.replaced_functions(model)
    table = Table("function of the model", "now runs", title="Functions", title_justify="left")
    for name, where in functions.items():
        # A loaded build is named after its unique id, which says nothing to a reader.
        table.add_row(name, f"[green]{where.replace(kernel.__name__, 'flash_kda')}[/]" if where else "the original")
    console.print(table)
    replaced = {name: where for name, where in functions.items() if where}
    if not replaced:
        sys.exit(
            f"Nothing was replaced. Either {type(model).__name__} has no KDA layers, or transformers {transformers.__version__} "
            f"does not take kernels {kernels.__version__} (5.20 to 5.22 take 0.17.2), or the GPU is not of compute capability 9.0."
        )
    return replaced


def paths_taken(model, prompt: torch.Tensor) -> list[str]:
    """What the package says ran in one prefill and one decode step: the CUDA kernel, or the PyTorch path and why."""
    said: dict[str, None] = {}
    handler = logging.Handler()
    handler.emit = lambda record: said.setdefault(record.getMessage())
    logger = logging.getLogger("flash_kda")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # kernels has set up a root logger that would print every call
    generate(model, prompt, 2)
    logger.setLevel(logging.WARNING)
    logger.removeHandler(handler)
    return list(said)


def main() -> None:
    args = arguments()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # it warns that its own path is the slow one, which is what we show
    kernel = load_kernel(args.kernel)
    console.print(f"[bold]kernels[/]  {Path(kernel.__file__).parent}", soft_wrap=True)
    start = time.perf_counter()
    with console.status("making the model ..."):
        model, tokenizer = load_model(args)
        synchronize(args.device)
    device = (
        torch.cuda.get_device_name(args.device)
        if args.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    console.print(
        f"[bold]model[/]    {args.checkpoint or args.preset}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters "
        f"({'of the checkpoint' if args.checkpoint else 'random'}), {str(args.dtype)[6:]}, on {device}, "
        f"ready in {time.perf_counter() - start:.1f} s",
        soft_wrap=True,
    )
    words = tokenizer.encode(args.prompt)
    length = args.prompt_tokens or len(words)
    prompt = torch.tensor((words * (length // len(words) + 1))[-length:], device=args.device).repeat(args.batch, 1)

    plain = None
    if not args.only_kernels:
        with console.status("generating without kernels ..."):
            plain = run(model, prompt, args.new_tokens)
            plain["logits"] = logits_of(model, plain["ids"], args.new_tokens)
            # What bf16 itself costs, where a second model in float32 is cheap: the scale on which to read the difference.
            exact = None
            if args.dtype == torch.bfloat16 and not args.checkpoint and args.preset == "small":
                exact = logits_of(copy.deepcopy(model).float(), plain["ids"], args.new_tokens)
    replaced = install(kernel, model)
    with console.status("generating with kernels ..."):
        ours = run(model, prompt, args.new_tokens)
        paths = paths_taken(model, prompt)
        if plain:
            ours["logits"] = logits_of(model, plain["ids"], args.new_tokens)

    for path in paths:
        console.print(f"[bold]runs[/]     {path}", soft_wrap=True)
    console.print(f"\n[dim]... {args.prompt}[/] [bold]{tokenizer.decode(ours['ids'][0, length:].tolist())}[/]\n")
    report = {
        "replaced": replaced,
        "paths": paths,
        "prompt_tokens": length,
        "new_tokens": args.new_tokens,
        "batch": args.batch,
    }
    table = Table(
        "tokens per second", *(["without kernels"] if plain else []), "with kernels", *(["times"] if plain else [])
    )
    for what, explained in (
        ("prefill", f"prefill of {args.batch} x {length}"),
        ("decode", f"decode, {args.batch} at a time"),
    ):
        figures = [f"{plain[what]:,.0f}"] if plain else []
        factor = [f"{ours[what] / plain[what]:.2f}"] if plain else []
        table.add_row(explained, *figures, f"[green]{ours[what]:,.0f}[/]", *factor)
        report[what] = {"without": plain and plain[what], "with": ours[what]}
    console.print(table)
    if plain:
        difference = (ours["logits"] - plain["logits"]).abs().max().item()
        size = plain["logits"].abs().max().item()
        same = (ours["ids"] == plain["ids"]).all(0).long().cumprod(0).sum().item() - length
        console.print(f"largest logit difference  {difference:.1e}, where the largest logit is {size:.1f}")
        report |= {"logit_difference": difference, "largest_logit": size, "same_tokens": same}
        if exact is not None:
            errors = [((arm["logits"] - exact).norm() / exact.norm()).item() for arm in (plain, ours)]
            console.print("from the float32 model    {:.2%} without kernels, {:.2%} with (rms)".format(*errors))
            report["error_to_float32"] = {"without": errors[0], "with": errors[1]}
        console.print(f"same tokens               {same} of {args.new_tokens}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
