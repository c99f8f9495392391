//! What the agent's memory holds beside its objects: the allocator's part, and that of the program's file.

use std::fs;
use std::path::Path;

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

/// Lets go of the program's code: most of it runs only at the start or now and then. What is needed comes again from the
/// kernel's cache of the file, a few dozen pages at a time.
pub fn let_go_of_code() {
    let (Ok(program), Ok(mappings)) =
        (fs::read_link("/proc/self/exe"), fs::read_to_string("/proc/self/maps"))
    else {
        return;
    };
    for (begin, end) in mappings.lines().filter_map(|line| code(line, &program)) {
        let address: *mut libc::c_void = std::ptr::with_exposed_provenance_mut(begin);
        // SAFETY: a mapping of a file that nobody can write or has written: its pages come again as they are.
        unsafe { libc::madvise(address, end - begin, libc::MADV_DONTNEED) };
    }
}

/// The addresses of a line of `/proc/PID/maps` (proc(5)), if they are of the program's code.
fn code(line: &str, program: &Path) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (addresses, rights) = (fields.next()?, fields.next()?);
    let path = line.find('/').map(|at| Path::new(&line[at..]))?;
    let (begin, end) = addresses.split_once('-')?;
    let range = (usize::from_str_radix(begin, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    (rights == "r-xp" && path == program).then_some(range)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_programs_own_code_is_let_go_of() {
        let program = Path::new("/opt/a b/portolan");
        let of = |line| code(line, program);
        let range = Some((0x5560_0000, 0x5560_3000));
        assert_eq!(of("55600000-55603000 r-xp 004cd000 fe:00 1234   /opt/a b/portolan"), range);
        assert_eq!(of("55600000-55603000 r--p 004cd000 fe:00 1234   /opt/a b/portolan"), None);
        assert_eq!(of("55600000-55603000 r-xp 004cd000 fe:00 1234   /usr/lib/libc.so.6"), None);
        assert_eq!(of("7ffc1000-7ffc3000 r-xp 00000000 00:00 0      [vdso]"), None);
    }

    #[test]
    fn code_that_was_let_go_of_runs_on() {
        let resident = || {
            let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
            let program = fs::read_link("/proc/self/exe").unwrap();
            let mut lines = smaps.lines();
            lines.find(|line| code(line, &program).is_some()).unwrap();
            let line = lines.find(|line| line.starts_with("Rss:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
        };
        let all: usize = (0..1_000).map(|n| format!("{n:?}").len()).sum();
        let before = resident();
        let_go_of_code();
        assert!(resident() < before, "{before} KiB");
        assert_eq!((0..1_000).map(|n| format!("{n:?}").len()).sum::<usize>(), all);
    }
}
