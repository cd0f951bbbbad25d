// Stable sort of floating-point numbers in linear time: by the digits of an integer key of the same
// order, least significant digit first. The last pass hands every element to the caller together
// with its rank, so that a sorted sequence that is only read once need not be stored.
// No torch header here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace fastcl::cpu {

// The bits of a floating-point type: an unsigned integer of its size, and infinity's.
template <typename T>
struct FloatBits;

template <>
struct FloatBits<float> {
  using Key = uint32_t;
  static constexpr Key kInfinity = 0x7F800000;
};

template <>
struct FloatBits<double> {
  using Key = uint64_t;
  static constexpr Key kInfinity = 0x7FF0000000000000;
};

template <typename T>
using KeyOf = typename FloatBits<T>::Key;

template <typename Key>
constexpr Key kSignBit = static_cast<Key>(Key{1} << (8 * sizeof(Key) - 1));

// v if sign is 0, -v if it is 1. Branches on the sign of arbitrary numbers would be mispredicted.
template <typename Key>
constexpr Key negate_if(Key sign, Key v) {
  const Key mask = static_cast<Key>(Key{0} - sign);
  return static_cast<Key>((v ^ mask) - mask);
}

// The key of x: -0 has that of +0, NaN of either sign has one of its own after infinity's.
template <typename T>
KeyOf<T> to_key(T x) {
  using Key = KeyOf<T>;
  Key bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Key magnitude = bits & static_cast<Key>(~kSignBit<Key>);
  const Key sign = static_cast<Key>(bits >> (8 * sizeof(Key) - 1));
  const Key key = static_cast<Key>(negate_if(sign, magnitude) + kSignBit<Key>);
  return magnitude > FloatBits<T>::kInfinity ? static_cast<Key>(~Key{0}) : key;
}

// The number with that key: +0 for both zeros, one NaN for all.
template <typename T>
T from_key(KeyOf<T> key) {
  using Key = KeyOf<T>;
  const Key signed_magnitude = static_cast<Key>(key - kSignBit<Key>);
  const Key sign = static_cast<Key>(signed_magnitude >> (8 * sizeof(Key) - 1));
  const Key sign_bit = static_cast<Key>(sign << (8 * sizeof(Key) - 1));
  const Key bits = negate_if(sign, signed_magnitude) | sign_bit;
  T x;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

// What a sort moves: keys alone, or with the positions they came from.
template <typename K>
struct BareKey {
  using Key = K;
  Key key;
  static BareKey make(Key key, int64_t) { return {key}; }
};

template <typename K>
struct IndexedKey {
  using Key = K;
  Key key;
  uint32_t index;
  static IndexedKey make(Key key, int64_t i) { return {key, static_cast<uint32_t>(i)}; }
};

// Up to here all pairs are compared faster than histograms are cleared and summed.
constexpr int64_t kCountSortMax = 64;
constexpr int kShortDigit = 8, kLongDigit = 11;
// Below this the histograms of long digits cost more than the pass that they save.
constexpr int64_t kLongDigitMin = 2048;
// From here on the random accesses of a caller miss the cache, and are better off in order of rank
// than amid the scattered stores of a pass.
constexpr int64_t kOrderedEmitMin = 32768;

// Rows that are worth a thread, with so many elements each: starting one takes as long as sorting
// a thousand elements.
inline int64_t rows_per_task(int64_t elements) {
  return std::max<int64_t>(1, 4096 / std::max<int64_t>(elements, 1));
}

constexpr int count_digits(int key_bits, int digit_bits) {
  return (key_bits + digit_bits - 1) / digit_bits;
}

// The scratch of one thread: room for `bytes` of items twice, and for the histograms.
class RadixScratch {
 public:
  explicit RadixScratch(int64_t bytes)
      : first_(::operator new(bytes)),
        second_(::operator new(bytes)),
        counts_(new uint32_t[count_digits(64, kLongDigit) << kLongDigit]) {}

  template <typename Item>
  Item* first() const {
    return static_cast<Item*>(first_.get());
  }
  template <typename Item>
  Item* second() const {
    return static_cast<Item*>(second_.get());
  }
  uint32_t* counts() const { return counts_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p); }
  };
  std::unique_ptr<void, Free> first_, second_;
  std::unique_ptr<uint32_t[]> counts_;
};

// counts[d][v] = the number of keys whose digit d is less than v: where those with v start.
// Returns, as a bit set, the digits in which the keys differ.
template <int kDigit, typename Key>
uint32_t start_positions(const Key* keys, int64_t n, uint32_t* counts) {
  constexpr int kDigits = count_digits(8 * sizeof(Key), kDigit);
  constexpr int64_t kBins = int64_t{1} << kDigit;
  std::memset(counts, 0, kDigits * kBins * sizeof(uint32_t));
  const auto count_of = [&](int d, Key key) -> uint32_t& {
    return counts[d * kBins + ((key >> (d * kDigit)) & (kBins - 1))];
  };
  for (int64_t i = 0; i < n; ++i) {
    for (int d = 0; d < kDigits; ++d) ++count_of(d, keys[i]);
  }
  uint32_t differ = 0;
  for (int d = 0; d < kDigits; ++d) differ |= uint32_t{count_of(d, keys[0]) != n} << d;
  // All digits at a time: independent sums overlap.
  uint32_t sums[kDigits] = {};
  for (int64_t v = 0; v < kBins; ++v) {
    for (int d = 0; d < kDigits; ++d) {
      uint32_t& count = counts[d * kBins + v];
      const uint32_t start = sums[d];
      sums[d] += count;
      count = start;
    }
  }
  return differ;
}

// One stable pass: put(position, item) for the n items, by their digit at `shift`.
template <int kDigit, typename ItemAt, typename Put>
void distribute(int64_t n, int shift, uint32_t* next, const ItemAt& item_at, const Put& put) {
  for (int64_t i = 0; i < n; ++i) {
    const auto item = item_at(i);
    put(next[(item.key >> shift) & ((1 << kDigit) - 1)]++, item);
  }
}

template <int kDigit, typename Item, typename MakeKey, typename Emit>
void radix_sort_by(int64_t n, const MakeKey& make_key, const RadixScratch& scratch,
                   const Emit& emit) {
  // Keys lie where the second pass, which no longer needs them, puts its items.
  auto* const keys = scratch.second<typename Item::Key>();
  for (int64_t i = 0; i < n; ++i) keys[i] = make_key(i);
  uint32_t passes = start_positions<kDigit>(keys, n, scratch.counts());

  const auto from_keys = [=](int64_t i) { return Item::make(keys[i], i); };
  const auto read = [](const Item* from) { return [=](int64_t i) { return from[i]; }; };
  const auto store = [](Item* to) { return [=](int64_t r, const Item& item) { to[r] = item; }; };
  const auto pass = [&](const auto& item_at, const auto& put) {
    int digit = 0;
    while ((passes >> digit & 1) == 0) ++digit;
    passes &= passes - 1;
    uint32_t* const next = scratch.counts() + (digit << kDigit);
    distribute<kDigit>(n, digit * kDigit, next, item_at, put);
  };
  const auto emit_all = [&](const auto& item_at) {
    for (int64_t r = 0; r < n; ++r) emit(r, item_at(r));
  };
  const auto emits = [&] { return (passes & (passes - 1)) == 0 && n < kOrderedEmitMin; };

  if (passes == 0) return emit_all(from_keys);
  if (emits()) return pass(from_keys, emit);
  Item* from = scratch.first<Item>();
  Item* to = scratch.second<Item>();
  pass(from_keys, store(from));
  while (passes != 0) {
    if (emits()) return pass(read(from), emit);
    pass(read(from), store(to));
    std::swap(from, to);
  }
  emit_all(read(from));
}

// The rank is the number of smaller elements, by comparison of all pairs: quadratic, but vector
// instructions do it without a branch on the data.
template <typename Item, typename MakeKey, typename Emit>
void count_sort(int64_t n, const MakeKey& make_key, const Emit& emit) {
  using Key = typename Item::Key;
  Key keys[kCountSortMax];
  Key ranks[kCountSortMax];
  for (int64_t i = 0; i < n; ++i) keys[i] = make_key(i);
  for (int64_t i = 0; i < n; ++i) {
    const Key key = keys[i];
    Key after = 0;  // earlier elements that come after i
    for (int64_t j = 0; j < i; ++j) {
      const Key behind = keys[j] > key;
      ranks[j] += behind;
      after += behind;
    }
    ranks[i] = static_cast<Key>(i - after);
  }
  for (int64_t i = 0; i < n; ++i) emit(static_cast<int64_t>(ranks[i]), Item::make(keys[i], i));
}

// Sorts the keys make_key(0..n-1), n < 2^31: calls emit(rank, item) once for each, in any order,
// equal keys having ranks in the order of their positions. The scratch: n * sizeof(Item) bytes.
template <typename Item, typename MakeKey, typename Emit>
void radix_sort(int64_t n, const MakeKey& make_key, const RadixScratch& scratch, const Emit& emit) {
  if (n <= kCountSortMax) return count_sort<Item>(n, make_key, emit);
  if constexpr (sizeof(typename Item::Key) > 2) {
    if (n >= kLongDigitMin) return radix_sort_by<kLongDigit, Item>(n, make_key, scratch, emit);
  }
  radix_sort_by<kShortDigit, Item>(n, make_key, scratch, emit);
}

}  // namespace fastcl::cpu
