"""Which kernels a prefill launches and what they take of the workspace: kda_cutlass/prefill/schedule.h, which is plain C++,
compiled and asked here without a GPU."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_kda import CUT, HALVED, HANDED_ON, SEGMENTS, SHARED, SLABS, STREAMED
from test_shared_gpu import CALLS as SHARED_GPU

SCHEDULE = Path(__file__).parents[1] / "kda_cutlass" / "prefill" / "schedule.h"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
SMS = 132  # of an H200
LIMIT = 208 << 20
FLAGS = 4096

ASK = r"""
#include <cstdio>
#include <utility>
#include "schedule.h"
int main() {  // a call a line: what is read below
  long long tokens, workspace, longest, chunks;
  int batch, num_seqs, heads, packed, checkpoints, invariant, sms;
  while (std::scanf("%lld %d %d %d %d %d %d %lld %d %lld %lld", &tokens, &batch, &num_seqs, &heads, &packed,
                    &checkpoints, &invariant, &workspace, &sms, &longest, &chunks) == 11) {
    kda::CallShape const call = {tokens,           batch,          num_seqs, heads, packed != 0,
                                 checkpoints != 0, invariant != 0, longest,  chunks};
    kda::Schedules const s = kda::choose_schedules(call, sms);
    long long const size = kda::workspace_size(call);
    kda::Slabs const slabs = kda::make_slabs(call, workspace > 0 ? workspace : size, sms);
    int const walkers = s.walkers.count;
    int const ring = walkers > 0 ? kda::ring_slots(call, s.walkers, workspace > 0 ? workspace : size) : 0;
    kda::Segments const& segments = s.walkers.segments;
    std::pair<char const*, long long> const answers[] = {
        {"fused", s.fused}, {"split", s.split}, {"walkers", walkers}, {"slices", s.walkers.slices},
        {"ring", ring}, {"ctas", s.walkers.ctas()}, {"segments", segments.count}, {"segment_chunks", segments.chunks},
        {"segments_bytes", walkers > 0 ? kda::segments_bytes(s.walkers) : 0},
        {"pieces", s.cut.pieces}, {"piece_chunks", s.cut.chunks}, {"shares", kda::shares(call, sms)},
        {"workspace", size}, {"needed", kda::needed_workspace(call, s, sms)}, {"slots", slabs.slots},
        {"slab_slots", slabs.slab_slots}, {"buffers", slabs.buffers}, {"split_values", slabs.split_values},
        {"records", slabs.records_bytes}, {"carry", slabs.carry_bytes}};
    char const* before = "{";
    for (auto const& [name, value] : answers) std::printf("%s\"%s\": %lld", std::exchange(before, ", "), name, value);
    std::printf("}\n");
    std::fflush(stdout);
  }
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    def program(name, source):
        """What answers a line in JSON."""
        folder = tmp_path_factory.mktemp("schedule")
        (folder / "main.cpp").write_text(source)
        command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Werror", f"-I{SCHEDULE.parent}", "main.cpp", "-o", name]
        subprocess.run(command, cwd=folder, check=True)
        with subprocess.Popen([folder / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

            def answer(line):
                process.stdin.write(line + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())

            yield answer
            process.stdin.close()

    return program


@pytest.fixture(scope="module")
def ask(compiled):
    for answer in compiled("ask", ASK):

        def of(
            heads,
            lengths=None,
            *,
            tokens=None,
            batch=1,
            sequences=None,
            checkpoints=False,
            invariant=False,
            workspace=0,
            sms=SMS,
            known=False,
        ):
            packed = lengths is not None and len(lengths) > 1 or sequences is not None
            tokens = sum(lengths) if tokens is None else tokens
            sequences = sequences if sequences is not None else len(lengths) if lengths is not None else batch
            each = [-(-length // 64) for length in lengths] if known else [0]
            return answer(
                f"{tokens} {batch} {sequences} {heads} {packed:d} {checkpoints:d} {invariant:d} {workspace} {sms} "
                f"{max(each)} {sum(each)}"
            )

        yield of


MIX = [1300, 547, 2048, 963, 271, 3063]


@pytest.mark.parametrize(
    "heads, lengths, launched",
    [
        (96, [8192], "walkers"),
        (96, MIX, "fused"),
        (96, [1024] * 8, "fused"),
        (64, [8192], "walkers"),
        (64, MIX, "fused"),
        (64, [1024] * 8, "fused"),
        (64, [16384], "walkers"),
        (64, [8192] * 2, "fused"),
        (32, [512], "split"),
        (32, [8192], "walkers"),
        (32, [131072], "walkers"),
        (32, [1024] * 8, "fused walkers"),  # few heads: the lengths may be anything, and decide
        (32, [256] * 32, "fused walkers"),
        (32, [1024] * 64, "fused walkers"),
        (32, [4096] * 2, "walkers"),
        (8, [4096] * 2, "split"),
        (12, [8192], "walkers"),
        (8, [65536], "walkers"),
        (8, [2048], "split"),
        (8, [4] * 1000, "fused walkers"),
    ],
)
def test_the_choice_for_the_benchmarks_shapes(ask, heads, lengths, launched):
    answer = ask(heads, lengths)
    assert " ".join(name for name in ("fused", "split", "walkers") if answer[name]) == launched


@pytest.mark.parametrize(
    "heads, lengths, launched",
    [
        (32, [1024] * 8, "fused"),
        (32, [256] * 32, "fused"),
        (32, [1024] * 64, "fused"),
        (32, [8000] + [24] * 8, "walkers"),
        (64, MIX, "fused"),
        (96, [30000] + [16] * 8, "walkers"),
        (16, [6000] + [100] * 20, "walkers"),
        (8, [4096] * 2, "split"),
        (8, [4] * 1000, "fused"),
    ],
)
def test_lengths_that_the_host_knows_need_one_schedule(ask, heads, lengths, launched):
    answer = ask(heads, lengths, known=True)
    assert " ".join(name for name in ("fused", "split", "walkers") if answer[name]) == launched


@pytest.mark.parametrize(
    "slices, sizes",
    [
        *((1, sizes) for sizes in STREAMED),
        *((2, sizes) for sizes in HALVED),
        (2, dict(B=4, T=1300, HV=21)),
        (1, dict(B=1, T=820, HV=64)),
        (1, dict(B=1, T=1100, HV=48)),
        (2, dict(B=1, T=1400, HV=20)),
    ],
    ids=str,
)
def test_what_the_tests_of_the_streamed_schedule_call(ask, slices, sizes):
    answer = ask(sizes["HV"], tokens=sizes["T"], batch=sizes["B"])
    assert answer["walkers"] and not answer["fused"] and not answer["split"]
    assert answer["slices"] == slices and answer["segments"] == 1


def test_what_processes_that_share_a_gpu_call(ask):
    answers = [ask(heads, tokens=tokens, batch=1) for heads, tokens in SHARED_GPU]
    launched = [[name for name in ("fused", "split", "walkers") if answer[name]] for answer in answers]
    assert launched == [["walkers"], ["walkers"], ["walkers"], ["split"], ["fused"]]
    assert [(answer["slices"], answer["segments"]) for answer in answers[:3]] == [(2, 3), (2, 1), (1, 1)]


@pytest.mark.parametrize("sizes, segments", [*zip(SEGMENTS, (3, 4, 2))], ids=str)
def test_what_the_tests_of_segments_call(ask, sizes, segments):
    call = dict(tokens=sizes["T"], batch=sizes["B"])
    answer = ask(sizes["HV"], **call)
    assert answer["walkers"] and answer["segments"] == segments
    assert ask(sizes["HV"], **call, invariant=True)["segments"] == 1


@pytest.mark.parametrize(
    "heads, lengths, segments",
    [
        (1, [8192], 6),
        (4, [8192], 4),
        (8, [8192], 2),
        (8, [65536], 2),
        (4, [65536], 4),
        (12, [65536], 1),  # too few producers would be left
        (32, [8192], 1),
        (8, [1 << 20], 1),  # what maps have for outputs would not fit
        (4, [4096] * 2, 1),  # lengths may be anything
    ],
)
def test_few_long_chains_are_walked_in_segments(ask, heads, lengths, segments):
    assert ask(heads, lengths)["segments"] == segments


@pytest.mark.parametrize("heads", [24, 32, 40, 48, 64, 80, 96])
def test_walkers_have_equal_shares(ask, heads):
    assert heads % ask(heads, [8192])["walkers"] == 0


@pytest.mark.parametrize(
    "heads, slices", [(4, 2), (8, 2), (12, 2), (20, 2), (24, 2), (32, 1), (48, 1), (64, 1), (96, 1)]
)
def test_few_chains_have_walkers_of_two_ctas(ask, heads, slices):
    answer = ask(heads, [16384])
    assert answer["walkers"] and answer["slices"] == slices


@pytest.mark.parametrize(
    "heads, lengths, pieces",
    [
        (8, [8192], 16),
        (12, [8192], 11),
        (8, [65536], 16),
        (32, [131072], 4),
        (64, [16384], 2),
        (64, [8192], 2),  # by a tenth and 40 us
        (16, [16384], 8),
        (48, [8192], 1),
        (32, [2048], 1),
        (32, [8192], 1),  # streamed: less to be gained than a look costs
        (8, [2048], 1),
        (96, [8192], 1),
        (8, [4096] * 2, 1),  # lengths may be anything
    ],
)
def test_chains_are_cut_where_that_may_pay(ask, heads, lengths, pieces):
    assert ask(heads, lengths)["pieces"] == pieces


@pytest.mark.parametrize(
    "heads, lengths, shares",
    [
        (133, [4096], True),
        (132, [4096], False),
        (27, [1024] * 5, True),
        (45, [2048] * 3, True),
        (32, [1024] * 8, False),  # two rounds of which 97 % are chains
        (96, [1024] * 8, False),
        (96, MIX, False),  # unequal lengths pay for it, so there has to be more in it
        (12, [8192], False),
    ],
)
def test_chains_are_shared_where_that_pays(ask, heads, lengths, shares):
    assert ask(heads, lengths)["shares"] == shares


@pytest.mark.parametrize("sizes", SHARED, ids=str)
def test_what_the_tests_of_shared_chains_call(ask, sizes):
    answer = ask(sizes["HV"], tokens=sizes["T"], batch=sizes["B"])
    assert answer["shares"] and answer["fused"]
    assert ask(27, [210] * 5)["shares"]


@pytest.mark.parametrize(
    "heads, lengths, megabytes",
    [
        (96, [1024] * 8, 0),  # fused: flags
        (133, [4096], 8),  # states on their way from one CTA to another
        (32, [8192], 36),  # streamed: the ring
        (32, [1024] * 8, 36),
        (8, [2048], 17),  # split
        (8, [65536], 99),  # streamed in segments
    ],
)
def test_a_call_asks_for_what_it_takes(ask, heads, lengths, megabytes):
    assert round(ask(heads, lengths)["needed"] / 2**20) == megabytes


def test_what_the_tests_of_cut_chains_call(ask):
    answers = [ask(sizes["HV"], tokens=sizes["T"], batch=sizes["B"]) for sizes in CUT]
    assert all(answer["pieces"] > 1 for answer in answers)
    assert [(answer["slices"], answer["segments"]) for answer in answers] == [(2, 2), (2, 1), (1, 1)]  # behind


def test_what_the_test_of_states_that_are_handed_on_calls(ask):
    tokens, heads = HANDED_ON
    answer = ask(heads, tokens=tokens)
    assert answer["pieces"] > 1 and 64 * answer["piece_chunks"] == 320
    assert answer["walkers"] and answer["segments"] == 1  # whose bits are those of the whole


def test_what_the_test_of_slabs_calls(ask):
    answer = ask(1, tokens=SLABS, invariant=True)
    assert answer["split"] and not answer["walkers"] and answer["slots"] > 2 * answer["slab_slots"]
    assert ask(8, tokens=SLABS, invariant=True)["walkers"]


@pytest.mark.parametrize("lengths", [[1024] * 8, [8192]], ids=["batch", "one"])
def test_checkpoints_are_written_by_the_split_schedule(ask, lengths):
    answer = ask(96, lengths, checkpoints=True)
    assert answer["split"] and not answer["fused"] and not answer["walkers"]


@pytest.mark.parametrize(
    "heads, lengths, ctas_a_head", [(8, [8192], 2), (66, [8192], 2), (67, [8192], 1), (96, [64], 1)]
)
def test_two_ctas_a_head_while_the_card_has_room(ask, heads, lengths, ctas_a_head):
    assert ask(heads, lengths)["split_values"] == ctas_a_head - 1


calls = {
    "heads": st.integers(1, 96) | st.integers(97, 6000),
    "tokens": st.integers(0, 4096) | st.integers(0, 1 << 22),
    "count": st.integers(1, 8) | st.integers(1, 2000),
    "packed": st.booleans(),
    "sms": st.sampled_from([SMS, 114, 78, 1]),
    "checkpoints": st.booleans(),
    "invariant": st.booleans(),
}


@settings(max_examples=400, deadline=None)
@given(**calls, times=st.integers(1, 4))
def test_every_call_is_served_within_its_workspace(
    ask, heads, tokens, count, packed, sms, checkpoints, invariant, times
):
    shape = {"sequences": count} if packed else {"batch": count}
    shape["invariant"] = invariant
    size = ask(heads, tokens=tokens, checkpoints=checkpoints, sms=sms, **shape)["needed"]
    answer = ask(heads, tokens=tokens, checkpoints=checkpoints, sms=sms, workspace=size * times, **shape)
    assert answer["fused"] or answer["split"] or answer["walkers"]
    if answer["walkers"]:
        walkers = answer["walkers"]
        assert not packed or count == 1 or heads % walkers == 0 or walkers % heads == 0  # of any lengths
        segments = answer["segments"]
        assert not checkpoints and walkers <= min(count * heads * segments, 64)
        assert answer["ctas"] == (2 * walkers - walkers // segments) * answer["slices"]
        assert 2 * (sms - answer["ctas"]) >= walkers  # a team of producers each
        assert answer["ring"] >= 8
        held = answer["segments_bytes"] + walkers * answer["ring"] * 66304
        assert FLAGS + 2 * answer["carry"] + held <= size * times
        if segments > 1:
            assert (not packed or count == 1) and not invariant and answer["slices"] == 2
            assert walkers == count * heads * segments
            assert (segments - 1) * answer["segment_chunks"] < -(-tokens // 64) <= segments * answer["segment_chunks"]
        else:
            assert answer["segments_bytes"] == 0
    one = FLAGS + 2 * answer["carry"] + heads * 66304
    assert size <= min(answer["workspace"], max(LIMIT, one))
    if answer["split"] or answer["walkers"]:
        assert FLAGS + 2 * answer["carry"] + answer["buffers"] * answer["records"] <= max(size * times, one)
    if answer["fused"] and answer["shares"]:
        assert FLAGS + sms * 65536 <= size
    assert answer["slots"] >= -(-tokens // 64) * (1 if packed else count)  # a slot for each chunk
    if answer["pieces"] > 1:
        assert (not packed or count == 1) and not checkpoints and not answer["fused"]
        each = -(-tokens // 64)
        assert (answer["pieces"] - 1) * answer["piece_chunks"] < each <= answer["pieces"] * answer["piece_chunks"]
        assert answer["piece_chunks"] >= 4 and (answer["pieces"] - 1) * count * heads <= FLAGS - 256  # a byte a cut
    assert answer["slab_slots"] >= 1 or answer["slots"] == 0
    assert answer["slab_slots"] <= 65535 and answer["buffers"] in (1, 2)


@settings(max_examples=200, deadline=None)
@given(heads=calls["heads"], tokens=calls["tokens"], count=calls["count"], packed=st.booleans())
def test_python_knows_the_workspace(ask, kernel, heads, tokens, count, packed):
    shape = {"sequences": count} if packed else {"batch": count}
    expected = ask(heads, tokens=tokens, **shape)["workspace"]
    assert kernel.prefill.workspace_size(1 if packed else count, tokens, count, heads, packed) == expected
    assert kernel.get_workspace_size(tokens, heads, count) >= ask(heads, tokens=tokens, sequences=count)["workspace"]


LISTS = r"""
#include <cstdio>
#include <string>
#include <vector>
#include "schedule.h"
using List = std::vector<std::string>;
std::string list(List const& items) {
  std::string text;
  for (std::string const& item : items) text += (text.empty() ? "" : ", ") + item;
  return "[" + text + "]";
}
std::string numbers(std::vector<int> const& values) {
  List items;
  for (int value : values) items.push_back(std::to_string(value));
  return list(items);
}
void print(List const& lists) {
  std::puts(list(lists).c_str());
  std::fflush(stdout);
}
"""

DEAL = (
    LISTS
    + r"""
int main() {  // chains chunks ctas: of each CTA the chain, first and last chunk of what it walks, in its order
  int chains, chunks, ctas;
  while (std::scanf("%d %d %d", &chains, &chunks, &ctas) == 3) {
    List all;
    for (int cta = 0; cta < ctas; ++cta) {
      kda::Portion const x = kda::deal_portion(chains, chunks, cta, ctas);
      List walked;
      for (int turn = 0, item; (item = x.item(turn, chains, cta, ctas)) < kda::Portion::kPieces * chains; ++turn) {
        if (item < 0) continue;
        int const piece = item / chains;
        walked.push_back(numbers({item % chains, piece == 2 ? x.rest_chunk : 0, piece == 1 ? x.front_chunks : chunks}));
      }
      all.push_back(list(walked));
    }
    print(all);
  }
}
"""
)


@pytest.fixture(scope="module")
def deal(compiled):
    yield from compiled("deal", DEAL)


@settings(max_examples=200, deadline=None)
@given(ctas=st.sampled_from([1, 2, 3, 7, SMS]), more=st.integers(1, 300), chunks=st.integers(0, 40))
def test_shared_chains_are_dealt_evenly(deal, ctas, more, chunks):
    chains = ctas + more
    portions = deal(f"{chains} {chunks} {ctas}")
    sizes = [sum(end - begin for _, begin, end in portion) for portion in portions]
    assert max(sizes) - min(sizes) <= 1
    walked = sorted(piece for portion in portions for piece in portion)
    whole = [[chain, chunk] for chain in range(chains) for chunk in range(chunks)]
    assert [[chain, chunk] for chain, begin, end in walked for chunk in range(begin, end)] == whole
    for cta, portion in enumerate(portions):
        for turn, (chain, begin, end) in enumerate(portion):
            if end < chunks:  # the front: before all else; the next CTA goes on with it, after all else
                assert turn == 0 and begin == 0 and portions[cta + 1][-1] == [chain, end, chunks]
            if begin > 0:
                assert turn == len(portion) - 1


SHARES = (
    LISTS
    + r"""
int main() {  // walkers heads makers steps: of each group the walkers and steps whose records it makes, in its order
  int walkers, heads, makers, steps;
  while (std::scanf("%d %d %d %d", &walkers, &heads, &makers, &steps) == 4) {
    kda::Teams const teams(walkers, heads, makers);
    List groups;
    for (int group = 0; group < kda::kGroupsAnSm * makers; ++group) {
      kda::Share const share = kda::deal_share(group, walkers, teams);
      List records;
      if (share.step >= 0)
        for (kda::Share::Turn turn = share.begin(); turn.step < steps; turn = share.next(turn))
          records.push_back(numbers({turn.walker, turn.step}));
      groups.push_back(list(records));
    }
    print(groups);
  }
}
"""
)


@pytest.fixture(scope="module")
def shares(compiled):
    yield from compiled("shares", SHARES)


@settings(max_examples=200, deadline=None)
@given(
    walkers=st.integers(1, 64),
    times=st.integers(1, 3),
    more=st.integers(0, 1),
    makers=st.integers(1, SMS - 1),
    steps=st.integers(0, 150),
)
def test_each_record_is_made_once(shares, walkers, times, more, makers, steps):
    assume(2 * makers >= walkers)
    groups = shares(f"{walkers} {walkers * times + more} {makers} {steps}")
    made = sorted(tuple(record) for group in groups for record in group)
    assert made == [(walker, step) for walker in range(walkers) for step in range(steps)]
    if more and walkers > 1:  # walkers with different sequences have groups of their own
        assert all(len({walker for walker, _ in group}) <= 1 for group in groups)
    for group in groups:  # in the order of the steps, so that no two wait for each other
        assert all(a < b for (_, a), (_, b) in zip(group, group[1:]))


@pytest.mark.parametrize("walkers, slices", [(32, 1), (48, 1), (33, 1), (8, 2)])
def test_all_groups_have_equal_shares(shares, walkers, slices):
    makers = SMS - walkers * slices
    made = [len(group) for group in shares(f"{walkers} {walkers} {makers} 1000")]
    assert len(made) == 2 * makers and max(made) - min(made) <= 1
