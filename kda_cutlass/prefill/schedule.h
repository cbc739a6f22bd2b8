// Which kernels a prefill launches, over how much of it at a time, and the workspace that this takes: from its shape
// alone, in plain C++, so that tests ask it without a GPU. What depends on the lengths of packed sequences the device
// decides, by the same costs.
//
//   fused  one CTA a chain (sequence, head): for calls with enough chains to fill the card; no workspace but flags
//   split  prepare makes records of chunks, for all chains in parallel, recurrence walks the chains with them
//   stream the same in one launch: some SMs walk while the others make records, which pass through the L2; for few,
//          long chains, and where packed lengths turn out to be too unequal for the fused kernel; the fewest chains are
//          walked in segments, all at once
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define KDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KDA_HOST_DEVICE inline
#endif

namespace kda {

constexpr int kHeadDim = 128;  // K = V, the only head dimension of the CUDA kernels
constexpr int kChunk = 64;     // tokens a chunk
// Of a chunk and value head, between prepare and recurrence: Record in record.cuh, which flash_kda.prefill knows too.
constexpr int kRecordBytes = 66304;

struct CallShape {
  int64_t tokens;  // T
  int batch, num_seqs, value_heads;
  bool packed;       // with cu_seqlens
  bool checkpoints;  // states inside sequences are wanted
  bool invariant;    // a sequence's bits are to depend on nothing beside it
  // Of packed sequences whose lengths the host knows, in chunks of one head: the longest, and all. Else 0.
  int64_t longest = 0, chunks = 0;

  bool one_length() const { return !packed || num_seqs == 1; }
  int64_t chains() const { return int64_t(num_seqs) * value_heads; }
  int64_t mean_chunks() const { return (tokens * batch / num_seqs + kChunk - 1) / kChunk; }  // of a sequence
};

// Pieces that chains are cut into: piece n owns `chunks` chunks from n * chunks on. All but the first start kWarmUp
// chunks before their own with a state of zeros, where the gates let them (prove.cuh).
constexpr int kWarmUp = 1;
constexpr int kLeastPiece = 4;  // chunks
constexpr int kMostCuts = 3840;
struct Cut {
  int pieces = 1, chunks = 0;
  KDA_HOST_DEVICE int64_t start(int piece) const { return int64_t(piece) * chunks * kChunk; }  // token of the sequence
};

// ---- the streamed schedule
// Segments of chains, walked beside each other: segment n owns `chunks` chunks from n * chunks on. A walker of a later one
// does not know the state before it: half of its CTAs start from zero, the other half find out what becomes of that state
// and what it adds to the outputs. In the end one is made of both (join.cuh).
struct Segments {
  int count = 1, chunks = 0;
  KDA_HOST_DEVICE int64_t tokens() const { return int64_t(chunks) * kChunk; }
};
constexpr int kLeastSegment = 16;  // chunks
constexpr int kMostWalkers = 64;
constexpr int kMostSlices = 2;                 // CTAs of a walker, with an equal share of the value channels each
constexpr int kMostReaders = 2 * kMostSlices;  // of a walker's records, where it walks a later segment
constexpr int kRingRecords = 512;              // of all walkers; what the L2 holds beside the inputs
constexpr int kLeastRingSlots = 8;             // of a walker
constexpr int kGroupsAnSm = 2;                 // of producers
constexpr int kMostPlaces = 256;               // SMs of which it matters which of them walk
static_assert(kMostWalkers * kLeastRingSlots <= kRingRecords);

// The groups of producers make all walkers' records in turn: numbered step by step, those of all walkers together, each
// group makes every so many. Where walkers have different sequences, each has groups of its own.
struct Teams {
  int makers;  // SMs that make records
  int groups;  // that have work

  inline Teams(int walkers, int heads, int makers)
      : makers(makers),
        groups(heads % walkers == 0 ? kGroupsAnSm * makers : kGroupsAnSm * makers / walkers * walkers) {}
};
// Which of the walkers' steps a group makes, one after another.
struct Share {
  int walker, step;  // of its first record; step < 0: it has none
  int walkers, next_walker, next_step;

  struct Turn {
    int walker, step;
  };
  KDA_HOST_DEVICE bool moves() const { return next_walker > 0; }
  KDA_HOST_DEVICE Turn begin() const { return {walker, step}; }
  KDA_HOST_DEVICE Turn next(Turn const& turn) const {
    int const to = turn.walker + next_walker, round = to >= walkers ? 1 : 0;
    return {to - round * walkers, turn.step + next_step + round};
  }
};
KDA_HOST_DEVICE Share deal_share(int group, int walkers, Teams const& teams) {
  return {group % walkers, group < teams.groups ? group / walkers : -1, walkers, teams.groups % walkers,
          teams.groups / walkers};
}

// Costs measured on an H200, in microseconds (docs/kernel-notes.md). `longest` of the sequences and `chunks` of all of
// them are counted in chunks of one head.
struct Choice {
  static constexpr float kFusedChunk = 5.8f;    // of a chain in the fused kernel, one chain an SM
  static constexpr float kFusedChain = .5f;     // of a chain beside its chunks, in chunks
  static constexpr float kSplitChunk = .087f;   // of all chains in prepare and recurrence, which fill the card
  static constexpr float kSplitStep = .95f;     // of a chain in the recurrence
  static constexpr float kSplitRecord = .035f;  // more for each that is prepared beside it
  static constexpr float kSplitStart = 10.f;    // more than the fused kernel needs before it is at work
  static constexpr float kProve = 12.f;         // of finding out whether chains may be cut, and of the start
  static constexpr float kProveStream = 16.f;   // the same before the streamed schedule
  // Of a chain in a walker of the streamed schedule that is one CTA, or two.
  static constexpr float kStreamStep[kMostSlices] = {1.62f, .94f};
  static constexpr float kStreamMake = 9.f;    // of a record in one of its groups of producers
  static constexpr float kStreamStart = 26.f;  // more than the fused kernel needs before it is at work
  // Of joining segments: the first later one, each other, a chunk of any of them.
  static constexpr float kJoin = 8.f, kJoinNext = 3.f, kJoinChunk = .02f;

  static KDA_HOST_DEVICE float fused(int64_t longest, int64_t chunks, int num_seqs, int heads, int sms) {
    int64_t const chains = int64_t(num_seqs) * heads;
    float const even = float(chunks) * heads / float(chains < sms ? chains : sms);
    return kFusedChunk * (even > longest ? even : float(longest));
  }
  static KDA_HOST_DEVICE float split(int64_t longest, int64_t chunks, int heads) {
    float const work = kSplitChunk * heads * chunks, chain = kSplitStep * longest + kSplitRecord * heads * chunks;
    return work > chain ? work : chain;
  }
  // `steps` of the walker that has most, `step` as above.
  static KDA_HOST_DEVICE float stream(float steps, float step) { return kStreamStart + steps * step; }
  static KDA_HOST_DEVICE float join(int segments, int64_t chunks) {
    return kJoin + kJoinNext * (segments - 2) + kJoinChunk * chunks;
  }
  // Steps where `walkers` is a multiple of `heads` or divides it, and all sequences of a head go to as many of them.
  static KDA_HOST_DEVICE float packed_steps(int64_t longest, int64_t chunks, int heads, int walkers) {
    if (walkers <= heads) return float(heads / walkers) * chunks;
    return longest + float(chunks - longest) * heads / walkers;
  }
  static KDA_HOST_DEVICE bool fused_pays(int64_t longest, int64_t chunks, int num_seqs, int heads, int walkers,
                                         float step, int sms) {
    return fused(longest, chunks, num_seqs, heads, sms) <
           (walkers > 0 ? stream(packed_steps(longest, chunks, heads, walkers), step) : split(longest, chunks, heads));
  }
};

// Chunks of all sequences, each with a record a head (Sequences in record.cuh).
inline int64_t slot_count(CallShape const& call) {
  return call.packed ? call.tokens / kChunk + call.num_seqs : call.batch * ((call.tokens + kChunk - 1) / kChunk);
}

// Who walks chains, and what the call costs with them, were its sequences of `each` chunks.
struct Walkers {
  int count = 0;   // 0: the streamed schedule can't do it
  int slices = 1;  // CTAs of each, twice as many where it walks a later segment
  float step = 0.f, cost = 0.f;
  Segments segments;

  int first() const { return count / segments.count; }  // that walk first segments, or chains
  int ctas() const { return (2 * count - first()) * slices; }
};

// ---- the workspace: flags, carries, what segments leave, records
constexpr int64_t kWorkspaceLimit = int64_t(208) << 20;
// Of the workspace, in front: whether the fused kernel does the call, how many chains are dealt and, from
// kForgottenBytes on, what was found about cuts or how many warps have handed over their part of a state.
constexpr int64_t kFlagBytes = 4096, kForgottenBytes = 256;

inline int64_t slot_bytes(int value_heads) { return int64_t(value_heads) * kRecordBytes; }
inline int64_t carry_bytes(int value_heads) { return int64_t(value_heads) * kHeadDim * kHeadDim * sizeof(float); }

// Slots whose records lie in the workspace beside flags and carries.
inline int64_t slot_capacity(int64_t workspace_bytes, int value_heads) {
  return std::max<int64_t>((workspace_bytes - kFlagBytes - 2 * carry_bytes(value_heads)) / slot_bytes(value_heads), 1);
}
// What a call asks for: at most the limit, or one chunk of every head where that is more; with `slots`, if more of them
// are of no use.
inline int64_t workspace_size(CallShape const& call, int64_t slots = INT64_MAX) {
  int64_t const most = slot_capacity(kWorkspaceLimit, call.value_heads);
  return std::min({slot_count(call), most, slots}) * slot_bytes(call.value_heads) + kFlagBytes +
         2 * carry_bytes(call.value_heads);
}

// In front of the ring: of each walker the state where its segment ends, of those of later segments the map there, too, and
// what a map has for outputs, a bf16 a token and channel.
inline int64_t segments_bytes(Walkers const& walkers) {
  int64_t const later = walkers.count - walkers.first();
  if (later == 0) return 0;
  return (walkers.count + later) * carry_bytes(1) +
         later * walkers.segments.tokens() * kHeadDim * int64_t(sizeof(short));
}
// Records of each walker that the workspace holds.
inline int ring_slots(CallShape const& call, Walkers const& walkers, int64_t workspace_bytes) {
  int64_t const left = workspace_bytes - kFlagBytes - 2 * carry_bytes(call.value_heads) - segments_bytes(walkers);
  return static_cast<int>(std::clamp<int64_t>(left / kRecordBytes, 0, kRingRecords) / walkers.count);
}

inline Walkers choose_walkers(CallShape const& call, int64_t each, int sms) {
  int64_t const chains = call.chains(), chunks = each * call.num_seqs;
  int64_t const records = slot_count(call) * call.value_heads;
  Walkers best;
  for (int slices = 1; slices <= kMostSlices; ++slices)
    for (int count = 1; count <= std::min<int64_t>(chains, kMostWalkers); ++count) {
      Teams const teams(count, call.value_heads, sms - count * slices);
      if (teams.groups < count || count * kLeastRingSlots > records) break;
      // Chains are dealt in turn. Whatever the lengths are, these have equal shares or several sequences each:
      bool const dealt_by_heads = call.value_heads % count == 0 || count % call.value_heads == 0;
      if (!call.one_length() && !dealt_by_heads) continue;
      // One sequence may hold more than the others: half of all.
      float const steps = call.one_length() ? float((chains + count - 1) / count) * each
                          : call.chunks > 0 ? Choice::packed_steps(call.longest, call.chunks, call.value_heads, count)
                                            : Choice::packed_steps((chunks + 1) / 2, chunks, call.value_heads, count);
      float const step = std::max(Choice::kStreamStep[slices - 1], Choice::kStreamMake * count / teams.groups),
                  cost = Choice::stream(steps, step);
      // Two CTAs read each record twice, so there has to be something in it.
      float const most = slices > best.slices ? .95f * best.cost : best.cost;
      if (best.count == 0 || cost < most) best = {count, slices, step, cost, {}};
    }
  if (!call.one_length() || call.invariant || best.count == 0) return best;
  for (int segments = 2; segments * kLeastSegment <= each && segments * chains <= kMostWalkers; ++segments) {
    Walkers walkers;
    walkers.count = static_cast<int>(segments * chains);
    walkers.slices = kMostSlices;
    walkers.segments = {segments, static_cast<int>((each + segments - 1) / segments)};
    int const team = kGroupsAnSm * (sms - walkers.ctas()) / walkers.count;
    if (team < 1) break;
    if ((segments - 1) * walkers.segments.chunks >= each) continue;  // fewer of this length do
    if (ring_slots(call, walkers, workspace_size(call)) < kLeastRingSlots) continue;
    walkers.step = std::max(Choice::kStreamStep[kMostSlices - 1], Choice::kStreamMake / team);
    walkers.cost = Choice::stream(walkers.segments.chunks, walkers.step) +
                   Choice::join(segments, (segments - 1) * walkers.segments.chunks * chains);
    if (walkers.cost < (best.segments.count > 1 ? 1.f : .95f) * best.cost) best = walkers;
  }
  return best;
}

// The cut with which the fused kernel would be done first, and in how many chunks' time.
struct CutChoice {
  Cut cut;
  float chunks;
};
inline CutChoice choose_cut(int64_t chains, int64_t each, int sms) {
  CutChoice best = {{}, float((chains + sms - 1) / sms * each)};
  for (int64_t pieces = 2; pieces * kLeastPiece <= each && (pieces - 1) * chains <= kMostCuts; ++pieces) {
    int64_t const chunks = (each + pieces - 1) / pieces;
    if ((pieces - 1) * chunks >= each) continue;  // fewer pieces of this length do
    float const longest = (chains * pieces + sms - 1) / sms * (chunks + kWarmUp + Choice::kFusedChain);
    if (longest < best.chunks) best = {{static_cast<int>(pieces), static_cast<int>(chunks)}, longest};
  }
  return best;
}

// Which schedules a call launches. Two where sequences are packed and their lengths decide, which only the device knows:
// the fused kernel, in front, then leaves word whether it did the call, and the other's kernels return at once if so.
struct Schedules {
  bool fused, split;
  Walkers walkers;  // of the streamed schedule; none without it
  Cut cut;          // into more than one piece: then the fused kernel comes first, and does it where the gates let it
};
inline Schedules choose_schedules(CallShape const& call, int sms) {
  if (call.checkpoints) return {false, true, {}, {}};  // only the recurrence writes them
  int const heads = call.value_heads;
  int64_t const each = call.mean_chunks(), chunks = each * call.num_seqs;
  float const fused_cost = Choice::fused(each, chunks, call.num_seqs, heads, sms),
              split_cost = Choice::split(each, chunks, heads);
  Walkers const walkers = each > 0 ? choose_walkers(call, each, sms) : Walkers{};
  bool const streams = walkers.count > 0 && walkers.cost < std::min(fused_cost, split_cost + Choice::kSplitStart);
  if (streams || split_cost <= fused_cost) {
    Cut cut;
    if (call.one_length()) {
      CutChoice const choice = choose_cut(call.chains(), each, sms);
      float const cost = (streams ? Choice::kProveStream : Choice::kProve) + Choice::kFusedChunk * choice.chunks;
      // Gates that remember pay some 10 us for the look at them, so there has to be something in it.
      float const whole = streams ? walkers.cost : split_cost;
      if (cost < std::max({.8f * whole, whole - 60.f, std::min(.9f * whole, whole - 40.f)})) cut = choice.cut;
    }
    return {false, !streams, streams ? walkers : Walkers{}, cut};
  }
  // With many heads one sequence that holds nearly all tokens is not much slower for it.
  bool const any_lengths = Choice::kSplitChunk * heads >= .8f * Choice::kFusedChunk;
  Schedules const fused = {true, false, {}, {}}, other = {false, walkers.count == 0, walkers, {}};
  if (!call.one_length() && call.chunks > 0) {  // as the device would decide
    bool const pays =
        Choice::fused_pays(call.longest, call.chunks, call.num_seqs, heads, walkers.count, walkers.step, sms);
    return pays ? fused : other;
  }
  return call.one_length() || any_lengths ? fused : Schedules{true, other.split, other.walkers, {}};
}

// ---- chains dealt by the fused schedule
// How: whole; cut into pieces; or shared, where their last round would leave many CTAs without work.
enum class Dealing : int { kWhole, kCut, kShared };

// What a CTA walks of shared chains, which have one length and are more than CTAs: as many chunks as any other, give or
// take one. Most are whole chains in turn, so that the CTAs are at neighbouring heads. The last one to two rounds lie in
// a row and are dealt by chunks: of a chain that comes to two CTAs one walks the front, before all else, and the next
// one the rest, after all else.
struct Portion {
  static constexpr int kPieces = 3;  // as items are numbered: wholes, fronts, rests
  int rounds;                        // of whole chains in turn
  int first_whole, wholes;           // others
  int front, front_chunks;           // a chain and how much of it comes first, 0: none
  int rest, rest_chunk;              // a chain and from where on it comes last, 0: none

  // What comes in a turn, by the number of an item; -1: nothing.
  KDA_HOST_DEVICE int item(int turn, int chains, int cta, int ctas) const {
    if (turn == 0) return front_chunks > 0 ? chains + front : -1;
    if (turn <= rounds) return (turn - 1) * ctas + cta;
    if (turn <= rounds + wholes) return first_whole + turn - 1 - rounds;
    if (turn == rounds + wholes + 1) return rest_chunk > 0 ? 2 * chains + rest : -1;
    return kPieces * chains;
  }
};
KDA_HOST_DEVICE Portion deal_portion(int chains, int64_t chunks, int cta, int ctas) {
  if (chunks == 0) return {0, 0, 0, 0, 0, 0, 0};
  int const rounds = chains / ctas - 1, dealt = rounds * ctas;
  int64_t const row = (chains - dealt) * chunks, begin = row * cta / ctas, end = row * (cta + 1) / ctas;
  int const whole = static_cast<int>((begin + chunks - 1) / chunks), rest = static_cast<int>(begin / chunks),
            front = static_cast<int>(end / chunks);
  return {rounds,
          dealt + whole,
          front - whole,
          dealt + front,
          static_cast<int>(end - front * chunks),
          dealt + rest,
          static_cast<int>(begin - rest * chunks)};
}
// Whether sharing pays, were all sequences of one length. It slows the kernel by a twentieth, unequal lengths too.
constexpr int kMostSharers = 512;  // CTAs
inline bool shares(CallShape const& call, int sms) {
  int64_t const chains = call.chains(), each = call.mean_chunks();
  if (chains <= sms || chains % sms == 0 || chains > (1 << 29) || sms > kMostSharers) return false;
  float const rounds = float(chains) / float(sms);
  float const whole = float((chains + sms - 1) / sms) * (each + Choice::kFusedChain),
              shared = rounds * each + (rounds + 1.f) * Choice::kFusedChain;
  return shared < (call.one_length() ? .93f : .85f) * whole;
}

// ---- the split schedule
static_assert(kFlagBytes - kForgottenBytes >= std::max<int64_t>(kMostCuts, kMostSharers * sizeof(int)));
constexpr int64_t kLeastSlab = 64;     // slots, below which a slab is not worth its launches
constexpr int64_t kMostSlots = 65535;  // of a launch: the second dimension of a grid

// What the schedules that a call may take do take of that.
inline int64_t needed_workspace(CallShape const& call, Schedules const& schedules, int sms) {
  if (schedules.fused && !schedules.split && schedules.walkers.count == 0)
    return kFlagBytes + (shares(call, sms) ? carry_bytes(sms) : 0);
  if (schedules.walkers.count == 0) return workspace_size(call);
  int64_t const ring = workspace_size(call, (kRingRecords + call.value_heads - 1) / call.value_heads);
  return std::min(ring + segments_bytes(schedules.walkers), workspace_size(call));
}

// The slots go through the workspace in slabs: prepare fills one, recurrence empties it. With two buffers the prepare of
// a slab runs beside the recurrence of the one before, on the SMs that it leaves free.
struct Slabs {
  int slots;              // of all sequences
  int slab_slots;         // of one pair of launches
  int buffers;            // slabs that lie in the workspace at a time
  bool split_values;      // two CTAs a head in the recurrence
  int64_t records_bytes;  // of one slab
  int64_t carry_bytes;    // of the states of all heads that one slab hands to the next; two of them, used in turn
};
inline Slabs make_slabs(CallShape const& call, int64_t workspace_bytes, int sms) {
  int64_t const slots = slot_count(call), capacity = slot_capacity(workspace_bytes, call.value_heads);
  auto const slabs_of = [&](int64_t most) { return std::max<int64_t>((slots + most - 1) / most, 1); };
  // Sequences and heads that a slab holds, when it holds as many sequences as its share of all slots.
  auto const chains_of = [&](int64_t slabs) { return (call.num_seqs + slabs - 1) / slabs * call.value_heads; };
  // Two CTAs a head while that leaves no SM without work that one CTA a head would have given it.
  auto const split = [&](int64_t chains) { return 2 * chains <= sms; };

  int64_t slabs = slabs_of(std::min(capacity, kMostSlots));
  int64_t const ctas = chains_of(slabs) * (split(chains_of(slabs)) ? 2 : 1);
  // Two buffers, where the recurrence leaves a quarter of the SMs free; slabs smaller than half of all chunks gain
  // nothing more (docs/kernel-notes.md).
  int const buffers = slots > kLeastSlab && capacity > 1 && 4 * ctas < 3 * sms ? 2 : 1;
  if (buffers == 2) slabs = slabs_of(std::min({std::max(kLeastSlab, slots / 2), capacity / 2, kMostSlots}));
  int64_t const slab_slots = (slots + slabs - 1) / slabs;  // of about equal size
  return {static_cast<int>(slots),
          static_cast<int>(slab_slots),
          buffers,
          split(chains_of(slabs)),
          slab_slots * slot_bytes(call.value_heads),
          carry_bytes(call.value_heads)};
}

}  // namespace kda
