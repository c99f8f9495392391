//! Atomic operations on words of maps. For the BPF target they are written out: the compiler knows them for its version 3 only,
//! whose 32-bit arithmetic on pointers to packets the verifier refuses. The kernel has them since Linux 5.12.

#[cfg(target_arch = "bpf")]
use core::arch::asm;
#[cfg(not(target_arch = "bpf"))]
use core::sync::atomic::{AtomicU64, Ordering};

/// Adds to a word, and gives what it was.
///
/// # Safety
/// `at` must be a word of a map, aligned, valid until the program ends.
#[inline(always)]
pub unsafe fn fetch_add(at: *mut u64, by: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = by;
        // SAFETY: the caller promises that the word is valid.
        unsafe { asm!("{1} = atomic_fetch_add((u64 *)({0} + 0), {1})", in(reg) at, inout(reg) value) };
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe {
        AtomicU64::from_ptr(at).fetch_add(by, Ordering::SeqCst)
    }
}

/// Clears bits of a word, and gives what it was.
///
/// # Safety
/// As [`fetch_add`].
#[inline(always)]
pub unsafe fn fetch_clear(at: *mut u64, bits: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = !bits;
        // SAFETY: the caller promises that the word is valid.
        unsafe { asm!("{1} = atomic_fetch_and((u64 *)({0} + 0), {1})", in(reg) at, inout(reg) value) };
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe {
        AtomicU64::from_ptr(at).fetch_and(!bits, Ordering::SeqCst)
    }
}

/// Writes a word if it is `old` still, and gives what it was: `old` where it was written.
///
/// # Safety
/// As [`fetch_add`].
#[inline(always)]
pub unsafe fn compare_exchange(at: *mut u64, old: u64, new: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let found;
        // SAFETY: the caller promises that the word is valid.
        unsafe {
            asm!("r0 = cmpxchg_64({0} + 0, r0, {1})", in(reg) at, in(reg) new, inout("r0") old => found)
        };
        found
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe {
        AtomicU64::from_ptr(at)
            .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .unwrap_or_else(|found| found)
    }
}

/// Adds to a word.
///
/// # Safety
/// As [`fetch_add`].
#[inline(always)]
pub unsafe fn add(at: *mut u64, by: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller promises that the word is valid.
    unsafe {
        asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) at, in(reg) by);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe {
        AtomicU64::from_ptr(at).fetch_add(by, Ordering::SeqCst);
    }
}

/// Writes a word, and gives what it was.
///
/// # Safety
/// As [`fetch_add`].
#[inline(always)]
pub unsafe fn swap(at: *mut u64, value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut word = value;
        // SAFETY: the caller promises that the word is valid.
        unsafe { asm!("{1} = xchg_64({0} + 0, {1})", in(reg) at, inout(reg) word) };
        word
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe {
        AtomicU64::from_ptr(at).swap(value, Ordering::SeqCst)
    }
}

/// Writes a word after all that was written before.
///
/// # Safety
/// As [`fetch_add`].
#[inline(always)]
pub unsafe fn publish(at: *mut u64, value: u64) {
    // SAFETY: the caller promises that the word is valid.
    unsafe { swap(at, value) };
}

/// Clears bits of a word.
///
/// # Safety
/// As [`fetch_add`].
#[inline(always)]
pub unsafe fn clear_bits(at: *mut u64, bits: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller promises that the word is valid.
    unsafe {
        asm!("lock *(u64 *)({0} + 0) &= {1}", in(reg) at, in(reg) !bits);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe {
        AtomicU64::from_ptr(at).fetch_and(!bits, Ordering::SeqCst);
    }
}

/// Sets bits of a word.
///
/// # Safety
/// As [`fetch_add`].
#[inline(always)]
pub unsafe fn set_bits(at: *mut u64, bits: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller promises that the word is valid.
    unsafe {
        asm!("lock *(u64 *)({0} + 0) |= {1}", in(reg) at, in(reg) bits);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe {
        AtomicU64::from_ptr(at).fetch_or(bits, Ordering::SeqCst);
    }
}
