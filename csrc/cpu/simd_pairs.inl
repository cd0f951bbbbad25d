// The loops over tiles that know of ids, biases, softplus and moments. Part of simd_kernels.inl.
namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE {
namespace {

template <typename T>
void leave_out_ids(Tile<T> s, const Id<T>* row_id, const Id<T>* col_id, bool drop) {
  const Vec<T> left_out = splat<T>(-__builtin_inf());
  for (int64_t i = 0; i < s.rows; ++i) {
    T* row = s.data + i * s.ld;
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      const auto same = load_ids<T>(col_id + j) == row_id[i];
      const Vec<T> x = load(row + j);
      store(row + j, drop ? (same ? left_out : x) : (same ? x : left_out));
    }
  }
}

template <typename T, bool kColumns>
FASTCL_INLINE void same_id_sums_impl(const Tile<T>& s, const Id<T>* row_id, const Id<T>* col_id,
                                     double* row_sum, int64_t* row_count, double* col_sum,
                                     int64_t* col_count) {
  alignas(64) T strip[kMaxTileCols];
  alignas(64) Id<T> strip_count[kMaxTileCols];
  for (int64_t first = 0; first < s.rows; first += kStripRows) {
    const int64_t last = first + kStripRows < s.rows ? first + kStripRows : s.rows;
    if (kColumns) {
      __builtin_memset(strip, 0, sizeof(strip));
      __builtin_memset(strip_count, 0, sizeof(strip_count));
    }
    for (int64_t i = first; i < last; ++i) {
      const T* row = s.data + i * s.ld;
      Vec<T> sum{};
      Bits<T> count{};
      for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
        const Vec<T> x = load(row + j);
        const Bits<T> same =
            bits<T>(load_ids<T>(col_id + j) == row_id[i]) & bits<T>(x != -__builtin_inf());
        const Vec<T> kept = keep<T>(same, x);
        sum += kept;
        count -= same;
        if (kColumns) {
          store(strip + j, load(strip + j) + kept);
          store_ids<T>(strip_count + j, load_ids<T>(strip_count + j) - same);
        }
      }
      row_sum[i] += horizontal_sum<T>(sum);
      for (int64_t k = 0; k < kLanes<T>; ++k) row_count[i] += count[k];
    }
    if (kColumns) {
      for (int64_t j = 0; j < s.cols; ++j) col_sum[j] += strip[j];
      for (int64_t j = 0; j < s.cols; ++j) col_count[j] += strip_count[j];
    }
  }
}

template <typename T>
void same_id_sums(Tile<T> s, const Id<T>* row_id, const Id<T>* col_id, double* row_sum,
                  int64_t* row_count, double* col_sum, int64_t* col_count) {
  if (col_sum != nullptr) {
    same_id_sums_impl<T, true>(s, row_id, col_id, row_sum, row_count, col_sum, col_count);
  } else {
    same_id_sums_impl<T, false>(s, row_id, col_id, row_sum, row_count, col_sum, col_count);
  }
}

template <typename T>
void pull_same_ids(Tile<T> s, const Id<T>* row_id, const Id<T>* col_id, const T* row_pull,
                   const T* col_pull) {
  for (int64_t i = 0; i < s.rows; ++i) {
    T* row = s.data + i * s.ld;
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      const auto same = load_ids<T>(col_id + j) == row_id[i];
      store(row + j, load(row + j) - keep<T>(same, load(col_pull + j) + row_pull[i]));
    }
  }
}

template <typename T>
void add_bias(Tile<T> s, const T* col_bias) {
  for (int64_t i = 0; i < s.rows; ++i) {
    T* row = s.data + i * s.ld;
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      store(row + j, load(row + j) + load(col_bias + j));
    }
  }
}

template <typename T>
void softplus_row_sums(Tile<T> s, const T* row_beta, const T* row_w, double* row_sum,
                       double* row_slope) {
  for (int64_t i = 0; i < s.rows; ++i) {
    T* row = s.data + i * s.ld;
    Vec<T> sum{}, slopes{};
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      const Softplus<T> softplus = Softplus<T>::of(load(row + j) + row_beta[i]);
      const Vec<T> slope = softplus.slope();
      sum += softplus.value();
      slopes += slope;
      if (row_w != nullptr) store(row + j, row_w[i] * slope);
    }
    row_sum[i] += horizontal_sum<T>(sum);
    row_slope[i] += horizontal_sum<T>(slopes);
  }
}

template <typename T>
void softplus_col_sums(Tile<T> s, const T* col_beta, double* col_sum, double* col_slope) {
  alignas(64) T strip[kMaxTileCols];
  alignas(64) T strip_slope[kMaxTileCols];
  for (int64_t first = 0; first < s.rows; first += kStripRows) {
    const int64_t last = first + kStripRows < s.rows ? first + kStripRows : s.rows;
    __builtin_memset(strip, 0, sizeof(strip));
    __builtin_memset(strip_slope, 0, sizeof(strip_slope));
    for (int64_t i = first; i < last; ++i) {
      const T* row = s.data + i * s.ld;
      for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
        const Softplus<T> softplus = Softplus<T>::of(load(row + j) + load(col_beta + j));
        store(strip + j, load(strip + j) + softplus.value());
        store(strip_slope + j, load(strip_slope + j) + softplus.slope());
      }
    }
    for (int64_t j = 0; j < s.cols; ++j) col_sum[j] += strip[j];
    for (int64_t j = 0; j < s.cols; ++j) col_slope[j] += strip_slope[j];
  }
}

template <typename T>
void sigmoid_weights(Tile<T> s, const T* row_beta, const T* row_w, const T* col_beta,
                     const T* col_w) {
  for (int64_t i = 0; i < s.rows; ++i) {
    T* row = s.data + i * s.ld;
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      const Vec<T> x = load(row + j);
      Vec<T> weight{};
      if (row_beta != nullptr) weight = row_w[i] * Softplus<T>::of(x + row_beta[i]).slope();
      if (col_beta != nullptr) {
        weight += load(col_w + j) * Softplus<T>::of(x + load(col_beta + j)).slope();
      }
      store(row + j, weight);
    }
  }
}

template <typename T>
void exp_row_moments(Tile<T> s, const T* row_shift, double* row_sum, double* row_moment) {
  // e^x is 0 there; 0 * -inf would be NaN.
  const T smallest = -1e4;
  for (int64_t i = 0; i < s.rows; ++i) {
    const T* row = s.data + i * s.ld;
    Vec<T> sum{}, moment{};
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      const Vec<T> x = load(row + j) - row_shift[i];
      const Vec<T> e = exp<T>(x);
      sum += e;
      moment += e * (x < smallest ? splat<T>(smallest) : x);
    }
    row_sum[i] += horizontal_sum<T>(sum);
    row_moment[i] += horizontal_sum<T>(moment);
  }
}

}  // namespace
}  // namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE
