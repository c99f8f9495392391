//! The kernel's own types (BTF, Documentation/bpf/btf.rst): which number a function of the kernel has among them.

use std::{fs, io};

/// Where the kernel tells them.
const PATH: &str = "/sys/kernel/btf/vmlinux";

/// Bytes of the head of a type: its name, its kind and how many members it has, its size or another type.
const HEAD: usize = 12;
/// `BTF_KIND_FUNC`.
const FUNCTION: u32 = 12;

/// The number of a function.
///
/// # Errors
/// `ENOENT` if the kernel has no such function or tells no types, [`io::ErrorKind::InvalidData`] if they cannot be understood.
pub(super) fn function(name: &str) -> io::Result<u32> {
    find(&fs::read(PATH)?, name)
}

fn find(types: &[u8], name: &str) -> io::Result<u32> {
    let damaged = || io::Error::from(io::ErrorKind::InvalidData);
    let word = |at: usize| -> io::Result<u32> {
        let bytes = types.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_ne_bytes).ok_or_else(damaged)
    };
    // `struct btf_header`: magic, version and flags, its length, where types and strings are behind it, and how long they are.
    let [head, first, length, strings] = [4, 8, 12, 16].map(|at| word(at).map(|word| word as usize));
    let (head, strings) = (head?, strings?);
    let (mut at, end) = (head + first?, head + length?);
    let named = |offset: u32| {
        let text = types.get(head + strings + offset as usize..).unwrap_or_default();
        text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    };
    let mut number = 1;
    while at < end {
        let shape = word(at + 4)?;
        let (kind, members) = (shape >> 24 & 0x1f, (shape & 0xffff) as usize);
        if kind == FUNCTION && named(word(at)?) {
            return Ok(number);
        }
        at += HEAD + behind(kind, members).ok_or_else(damaged)?;
        number += 1;
    }
    Err(io::Error::from_raw_os_error(libc::ENOENT))
}

/// How many bytes follow the head of a type; `None` of a kind that is not known.
const fn behind(kind: u32, members: usize) -> Option<usize> {
    Some(match kind {
        // Integers, variables, tags of declarations.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structures, unions, sections, enumerations of 64 bits.
        4 | 5 | 15 | 19 => 12 * members,
        // Enumerations, prototypes of functions.
        6 | 13 => 8 * members,
        // Pointers, forward declarations, other names, qualifiers, functions, floating point, tags of types.
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_found_by_its_name_among_types_of_other_sizes() {
        let strings = b"\0one\0two\0";
        let types: [u32; 16] = [1, 1 << 24, 4, 0, 1, 4 << 24 | 1, 8, 0, 0, 0, 1, 12 << 24, 0, 5, 12 << 24, 0];
        let bytes: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let header = [0x0001_eb9f_u32, 24, 0, bytes.len() as u32, bytes.len() as u32, strings.len() as u32];
        let mut all: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        all.extend(bytes);
        all.extend(strings);
        assert_eq!(find(&all, "one").unwrap(), 3);
        assert_eq!(find(&all, "two").unwrap(), 4);
        assert_eq!(find(&all, "tw").unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert!(find(&all[..40], "two").is_err());
    }
}
