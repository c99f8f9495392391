//! The allocator's part of the agent's memory.

/// Gives back to the kernel what the allocator keeps of freed memory: after work that took far more than what stays.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the function has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets go of what is part of the program's file and not needed for now: if it is, the kernel reads it again.
pub fn let_go(bytes: &'static [u8]) {
    let page = usize::try_from(page_size()).unwrap_or(usize::MAX);
    let begin = bytes.as_ptr().addr().next_multiple_of(page);
    let end = (bytes.as_ptr().addr() + bytes.len()) / page * page;
    if begin < end {
        let whole_pages = &bytes[begin - bytes.as_ptr().addr()..][..end - begin];
        // SAFETY: whole pages of a file's mapping that nobody can write: they come again as they are.
        unsafe {
            libc::madvise(whole_pages.as_ptr().cast_mut().cast(), whole_pages.len(), libc::MADV_DONTNEED)
        };
    }
}

fn page_size() -> libc::c_long {
    // SAFETY: the function has no preconditions.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }
}

/// Has all threads share one arena: several keep their freed memory each for itself, and the agent's threads hand most of what
/// they allocate to another. To be called before there are threads.
pub fn share_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the function has no preconditions.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
