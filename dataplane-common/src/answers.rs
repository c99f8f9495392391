//! The table by which answers that say no are limited: its elements.

use crate::Addr;

/// The TCP resets of a CPU.
pub const RESETS: u32 = 0;
/// Its ICMP errors.
pub const ICMP: u32 = 1;
/// The first of its ICMP errors by source.
const FIRST_SOURCE: u32 = 2;
/// Hashes of a source, a power of two.
const SOURCES: u32 = 16;

/// How many elements there are.
pub const ANSWER_RATES: usize = (FIRST_SOURCE + SOURCES) as usize;

/// The element of a source.
#[inline(always)]
pub const fn by_source(source: &Addr) -> u32 {
    let [high, low] = source.words();
    let mixed = (high ^ low.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    FIRST_SOURCE + (mixed >> 32) as u32 % SOURCES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_share_all_elements_that_are_theirs() {
        let elements = (0..1_000_u32).map(|number| by_source(&Addr::from_v4(number.to_be_bytes())));
        let elements: std::collections::BTreeSet<_> = elements.collect();
        assert_eq!(elements, (FIRST_SOURCE..FIRST_SOURCE + SOURCES).collect());
    }
}
