"""What a KDA call may look like. Every public function checks its arguments here, once, before anything is written.

The checks read shapes, strides, dtypes and devices, never contents: they cost no synchronisation and `torch.compile`
traces them. Errors are ``ValueError`` or ``TypeError`` and read ``<argument>: expected <what>, got <what>``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STATE_FLOATS = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


class Call(NamedTuple):
    """A checked call. The order of the fields is that of the custom ops' arguments (``dispatch.py``)."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, HV, V]
    g: torch.Tensor  # [B, T, HV, K]
    beta: torch.Tensor  # [B, T, HV]
    A_log: torch.Tensor | None  # HV elements; None unless the gate is computed in the kernel
    dt_bias: torch.Tensor | None  # HV * K elements; likewise
    initial_state: torch.Tensor | None  # [N, HV, K, V], or [N, HV, V, K] with state_v_first
    cu_seqlens: torch.Tensor | None  # [N + 1]
    cu_seqlens_cpu: torch.Tensor | None  # the same on the host
    scale: float
    lower_bound: float | None  # None: the softplus gate. Only read with use_gate_in_kernel
    use_gate_in_kernel: bool
    use_qk_l2norm_in_kernel: bool
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    state_v_first: bool
    batch_invariant: bool
    recurrent: bool = False  # a call of fused_recurrent_kda: a few tokens a sequence

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        K, V = self.q.shape[3], self.v.shape[3]
        return (self.num_sequences, self.v.shape[2], *((V, K) if self.state_v_first else (K, V)))

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the state that a call returns: float32 as in FLA, float64 for float64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


class States(NamedTuple):
    """Where the states of a recurrent call lie, beside its :class:`Call`, whose ``initial_state`` is the pool where there
    are indices. The order of the fields is that of the custom op's arguments."""

    ssm_state_indices: torch.Tensor | None  # [N], or [N, S] with a column for every token
    num_accepted_tokens: torch.Tensor | None  # [N]
    token_states: torch.Tensor | None  # [B, T, HV, K, V], or V-first
    inplace_final_state: bool
    min_state_index: int

    @property
    def by_token(self) -> bool:
        return self.ssm_state_indices is not None and self.ssm_state_indices.dim() == 2


class PrefillStates(NamedTuple):
    """Where the states of a prefill lie, beside its :class:`Call`, whose ``initial_state`` is the pool where there are
    indices. The order of the fields is that of the ops' arguments."""

    ssm_state_indices: torch.Tensor | None = None  # [N]
    has_initial_state: torch.Tensor | None = None  # [N] bool
    final_state_in_slots: bool = False  # else [N, HV, K, V]
    min_state_index: int = 0
    checkpoint_state: torch.Tensor | None = None  # [slots, HV, K, V], or V-first
    checkpoint_offsets: torch.Tensor | None = None  # [N], [N, C], or [M] with checkpoint_indptr
    checkpoint_indices: torch.Tensor | None = None  # likewise
    checkpoint_indptr: torch.Tensor | None = None  # [N + 1]
    checkpoint_multiple: int = 16  # or 64


def check_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float | None,
    lower_bound: float | None,
    use_gate_in_kernel: bool,
    use_qk_l2norm_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    state_v_first: bool,
    cu_seqlens_cpu: torch.Tensor | None = None,
    safe_gate: bool = False,
    batch_invariant: bool = False,
    recurrent: bool = False,
    pool: bool = False,
) -> Call:
    """Checks the arguments of :func:`flash_kda.chunk_kda` and gives them their defaults. With ``pool`` the initial state is
    a pool of any number of slots.

    The last dimension of q, k, v and g must be contiguous on every device: the kernels read it in vectors, and a silent
    copy of the four largest tensors would hide the cost. All other strides are free.
    """
    for name, x, rank in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("g", g, 4), ("beta", beta, 3)):
        _tensor(name, x, FLOATS, q)
        if x.dim() != rank:
            raise _broken(name, f"rank {rank}", f"shape {_shape(x)}")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if H == 0 or HV % H != 0:
        raise _broken("v", f"a number of heads HV that is a multiple of q's H = {H}", f"HV = {HV}")
    _has_shape("k", k, (B, T, H, K), "that of q, [B, T, H, K]")
    _has_shape("v", v, (B, T, HV, V), "[B, T, HV, V]")
    _has_shape("g", g, (B, T, HV, K), "[B, T, HV, K]")
    _has_shape("beta", beta, (B, T, HV), "[B, T, HV]")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise _broken(name, f"dtype {q.dtype}, that of q", x.dtype, TypeError)
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g)):
        _dense_rows(name, x)

    scale = K**-0.5 if scale is None else _number("scale", scale)
    if lower_bound is not None:
        lower_bound = _number("lower_bound", lower_bound)
        if not lower_bound < 0:
            raise _broken("lower_bound", "a finite negative number", lower_bound)
    if use_gate_in_kernel:
        if lower_bound is None:
            if safe_gate:
                raise _broken("lower_bound", "a finite negative number, since safe_gate=True", None)
            if A_log is None:
                raise _broken("A_log", "HV elements, since use_gate_in_kernel=True without lower_bound", None)
        if A_log is not None:
            _tensor("A_log", A_log, FLOATS, q)
            if A_log.numel() != HV:
                raise _broken("A_log", f"{HV} elements (HV)", f"shape {_shape(A_log)}")
        if dt_bias is not None:
            _tensor("dt_bias", dt_bias, FLOATS, q)
            if dt_bias.numel() != HV * K:
                raise _broken("dt_bias", f"{HV * K} elements (HV * K)", f"shape {_shape(dt_bias)}")
    else:
        A_log = dt_bias = lower_bound = None
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise _broken("allow_neg_eigval", "False, or use_beta_sigmoid_in_kernel=True with it", "True without it")

    if cu_seqlens is not None:
        _tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), q)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise _broken("cu_seqlens", "shape [N + 1]", f"shape {_shape(cu_seqlens)}")
        if B != 1:
            raise _broken("q", "batch size 1 with cu_seqlens (pack the sequences along T)", f"batch size {B}")
    if cu_seqlens_cpu is not None:
        if cu_seqlens is None:
            raise _broken("cu_seqlens_cpu", "cu_seqlens beside it", None)
        _tensor("cu_seqlens_cpu", cu_seqlens_cpu, (torch.int32, torch.int64), None)
        if cu_seqlens_cpu.device.type != "cpu":
            raise _broken("cu_seqlens_cpu", "device cpu", cu_seqlens_cpu.device)
        _has_shape("cu_seqlens_cpu", cu_seqlens_cpu, tuple(cu_seqlens.shape), "that of cu_seqlens, [N + 1]")

    call = Call(
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        cu_seqlens,
        cu_seqlens_cpu,
        scale,
        lower_bound,
        bool(use_gate_in_kernel),
        bool(use_qk_l2norm_in_kernel),
        bool(use_beta_sigmoid_in_kernel),
        bool(allow_neg_eigval),
        bool(state_v_first),
        bool(batch_invariant),
        recurrent,
    )
    if initial_state is not None:
        if pool:
            _pool("initial_state", initial_state, 1, call)
        else:
            _state("initial_state", initial_state, call)
    return call


def check_states(
    call: Call,
    ssm_state_indices: torch.Tensor | None,
    num_accepted_tokens: torch.Tensor | None,
    token_states: torch.Tensor | None,
    inplace_final_state: bool,
    min_state_index: int,
) -> States:
    """Checks the serving arguments of :func:`flash_kda.fused_recurrent_kda`."""
    T, N = call.q.shape[1], call.num_sequences
    if call.initial_state is None and (inplace_final_state or ssm_state_indices is not None):
        raise _broken("initial_state", "the states that inplace_final_state or ssm_state_indices speak of", None)
    if inplace_final_state and ssm_state_indices is None and not call.initial_state.is_contiguous():
        strides = f"strides {list(call.initial_state.stride())}"
        raise _broken("initial_state", "a contiguous tensor, since inplace_final_state=True", strides)
    if ssm_state_indices is not None:
        _tensor("ssm_state_indices", ssm_state_indices, INTEGERS, call.q)
        if ssm_state_indices.dim() not in (1, 2) or ssm_state_indices.shape[0] != N:
            shape = f"shape {_shape(ssm_state_indices)}"
            raise _broken("ssm_state_indices", f"shape [N] or [N, S], N = {N} sequences", shape)
        if ssm_state_indices.dim() == 2:
            least = T if call.cu_seqlens is None else 1
            if ssm_state_indices.shape[1] < max(least, 1):
                shape = f"shape {_shape(ssm_state_indices)}"
                raise _broken("ssm_state_indices", f"a column for each of {max(least, 1)} tokens or more", shape)
    if num_accepted_tokens is not None:
        if ssm_state_indices is None:
            raise _broken("num_accepted_tokens", "ssm_state_indices beside it", None)
        _tensor("num_accepted_tokens", num_accepted_tokens, INTEGERS, call.q)
        _has_shape("num_accepted_tokens", num_accepted_tokens, (N,), "[N]")
    if token_states is not None:
        _pool("token_states", token_states, 2, call)
        if token_states.shape[:2] != call.q.shape[:2]:
            expected = f"shape [B, T, ...] = {[*call.q.shape[:2]]} + ..."
            raise _broken("token_states", expected, f"shape {_shape(token_states)}")
    _min_state_index(min_state_index)
    return States(ssm_state_indices, num_accepted_tokens, token_states, bool(inplace_final_state), min_state_index)


def check_prefill_states(
    call: Call,
    final_state: torch.Tensor | None,
    ssm_state_indices: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    min_state_index: int,
    checkpoint_state: torch.Tensor | None,
    checkpoint_offsets: torch.Tensor | None,
    checkpoint_indices: torch.Tensor | None,
    checkpoint_indptr: torch.Tensor | None,
    checkpoint_multiple: int,
) -> PrefillStates | None:
    """Checks the pool and checkpoint arguments of :func:`flash_kda.fwd`; None where there are none."""
    N = call.num_sequences
    _min_state_index(min_state_index)
    if checkpoint_multiple not in (16, 64):
        raise _broken("checkpoint_multiple", "16 or 64", checkpoint_multiple)
    if ssm_state_indices is not None:
        if call.initial_state is None and final_state is None:
            raise _broken("initial_state", "the pool that ssm_state_indices speaks of, here or in final_state", None)
        _tensor("ssm_state_indices", ssm_state_indices, INTEGERS, call.q)
        _has_shape("ssm_state_indices", ssm_state_indices, (N,), "[N]")
    if has_initial_state is not None:
        if call.initial_state is None:
            raise _broken("initial_state", "the states that has_initial_state speaks of", None)
        _tensor("has_initial_state", has_initial_state, (torch.bool,), call.q)
        _has_shape("has_initial_state", has_initial_state, (N,), "[N]")
    if checkpoint_state is None:
        for name, x in (
            ("checkpoint_offsets", checkpoint_offsets),
            ("checkpoint_indices", checkpoint_indices),
            ("checkpoint_indptr", checkpoint_indptr),
        ):
            if x is not None:
                raise _broken("checkpoint_state", f"the states that {name} speaks of", None)
    else:
        _pool("checkpoint_state", checkpoint_state, 1, call)
        if checkpoint_offsets is None:
            raise _broken("checkpoint_offsets", "the positions of the states in checkpoint_state", None)
        _tensor("checkpoint_offsets", checkpoint_offsets, INTEGERS, call.q)
        shape = tuple(checkpoint_offsets.shape)
        if checkpoint_indptr is None:
            if len(shape) not in (1, 2) or shape[0] != N:
                raise _broken("checkpoint_offsets", f"shape [N] or [N, C], N = {N} sequences", f"shape {[*shape]}")
        else:
            _tensor("checkpoint_indptr", checkpoint_indptr, INTEGERS, call.q)
            _has_shape("checkpoint_indptr", checkpoint_indptr, (N + 1,), "[N + 1]")
            if len(shape) != 1:
                raise _broken("checkpoint_offsets", "shape [M] with checkpoint_indptr", f"shape {[*shape]}")
        if checkpoint_indices is not None:
            _tensor("checkpoint_indices", checkpoint_indices, INTEGERS, call.q)
            _has_shape("checkpoint_indices", checkpoint_indices, shape, "that of checkpoint_offsets")
    if ssm_state_indices is None and has_initial_state is None and checkpoint_state is None:
        return None
    return PrefillStates(
        ssm_state_indices,
        has_initial_state,
        final_state is not None and ssm_state_indices is not None,
        min_state_index,
        checkpoint_state,
        checkpoint_offsets,
        checkpoint_indices,
        checkpoint_indptr,
        int(checkpoint_multiple),
    )


def check_outputs(
    call: Call,
    out: torch.Tensor,
    final_state: torch.Tensor | None,
    workspace: torch.Tensor | None = None,
    size: int = 0,
    pool: bool = False,
) -> None:
    """Checks the tensors that a caller hands over to be written; ``size`` is what the workspace must hold, in bytes. With
    ``pool`` the final state is a pool of any number of slots."""
    _tensor("out", out, (call.q.dtype,), call.q)
    _has_shape("out", out, tuple(call.v.shape), "that of v, [B, T, HV, V]")
    _dense_rows("out", out)
    if final_state is not None and pool:
        _pool("final_state", final_state, 1, call)
    elif final_state is not None:
        _state("final_state", final_state, call)
        if not final_state.is_contiguous():
            raise _broken("final_state", "a contiguous tensor", f"strides {list(final_state.stride())}")
    if workspace is not None:
        _tensor("workspace", workspace, (torch.uint8,), call.q)
        if workspace.dim() != 1 or workspace.stride(0) != 1 or workspace.shape[0] < size:
            raise _broken("workspace", f"shape [{size}] or longer, contiguous", f"shape {_shape(workspace)}")


def check_contents(call: Call, states: PrefillStates | None = None) -> None:
    """Checks the contents of ``cu_seqlens`` and ``checkpoint_offsets``, which costs a synchronisation: only under
    ``FLASH_KDA_VALIDATE=1``."""
    if states is not None and states.checkpoint_offsets is not None:
        for offset in states.checkpoint_offsets.flatten().tolist():
            if offset > 0 and offset % states.checkpoint_multiple:
                expected = f"multiples of {states.checkpoint_multiple} tokens, or 0 or less for none"
                raise _broken("checkpoint_offsets", expected, offset)
    if call.cu_seqlens is None:
        return
    bounds = call.cu_seqlens.tolist()
    T = call.q.shape[1]
    if bounds[0] != 0:
        raise _broken("cu_seqlens", "0 as its first element", bounds[0])
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if start > end:
            raise _broken("cu_seqlens", "nondecreasing elements", f"{start} before {end} at sequence {n}")
    if bounds[-1] > T:
        raise _broken("cu_seqlens", f"no element past T = {T}", bounds[-1])


def as_parameter(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``A_log`` or ``dt_bias`` as the kernels read it: contiguous float32 of this shape at a multiple of 16 bytes, which a
    parameter mostly is as it comes."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = x.float().contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    return x if x.shape == shape else x.view(shape)


def _min_state_index(x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise _broken("min_state_index", "an int", type(x).__name__, TypeError)
    if x < 0:
        raise _broken("min_state_index", "0 or more: a negative index is padding always", x)


def _broken(name: str, expected: str, got: Any, error: type[Exception] = ValueError) -> Exception:
    """Made only when it is raised: a call that is right formats nothing."""
    return error(f"{name}: expected {expected}, got {got}")


def _shape(x: torch.Tensor) -> list[int]:
    return list(x.shape)


def _tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], beside: torch.Tensor | None) -> None:
    """x is a tensor of one of ``dtypes``, on the device of q (``beside``)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")
    if beside is not None and x is not beside and x.device != beside.device:
        raise ValueError(f"{name}: expected device {beside.device}, that of q, got {x.device}")


def _has_shape(name: str, x: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} ({meaning}), got {_shape(x)}")


def _dense_rows(name: str, x: torch.Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: expected a contiguous last dimension (stride 1), got strides {list(x.stride())}")


def _state(name: str, x: torch.Tensor, call: Call) -> None:
    _tensor(name, x, (*STATE_FLOATS, torch.float64) if call.q.dtype == torch.float64 else STATE_FLOATS, call.q)
    meaning = "[N, HV, V, K], V-first" if call.state_v_first else "[N, HV, K, V]"
    _has_shape(name, x, call.state_shape, f"{meaning}, N = {call.num_sequences} sequences")


def _pool(name: str, x: torch.Tensor, lead: int, call: Call) -> None:
    """States with ``lead`` dimensions before [HV, K, V], whose strides are free; the last three are dense."""
    _tensor(name, x, (*STATE_FLOATS, torch.float64) if call.q.dtype == torch.float64 else STATE_FLOATS, call.q)
    inner = call.state_shape[1:]
    if x.dim() != lead + 3 or x.shape[lead:] != inner:
        meaning = "[HV, V, K], V-first" if call.state_v_first else "[HV, K, V]"
        raise _broken(name, f"{lead} dimensions and then {list(inner)} ({meaning})", f"shape {_shape(x)}")
    dense = 1
    for size, stride in zip(reversed(x.shape[lead:]), reversed(x.stride()[lead:])):
        if size > 1 and stride != dense:
            raise _broken(name, "dense states, only the strides before [HV, ...] free", f"strides {list(x.stride())}")
        dense *= size


def _number(name: str, x: Any) -> float:
    if not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)) or isinstance(x, bool):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite {'negative ' if name == 'lower_bound' else ''}number, got {x}")
    return float(x)
