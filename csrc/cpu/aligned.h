// Arrays that begin with a cache line, so that no register is loaded from two.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace vsr1 {

template <typename T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}

    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
    void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t{64}); }

    template <typename U>
    bool operator==(const LineAllocator<U>&) const {
        return true;
    }
};

template <typename T>
using Aligned = std::vector<T, LineAllocator<T>>;

}  // namespace vsr1
