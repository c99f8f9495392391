//! One hash for all that several nodes, or a node's programs and its agent, must agree on.

/// A number from all of `u64`, the same for the same words and salt, and else as good as drawn (after splitmix64, Steele, Lea and
/// Flood 2014).
#[inline(always)]
pub const fn mix<const N: usize>(words: [u64; N], salt: u64) -> u64 {
    let mut mixed = salt;
    let mut at = 0;
    while at < N {
        mixed = step(mixed, words[at]);
        at += 1;
    }
    mixed.wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// The same of bytes. Their number counts as well.
pub const fn mix_bytes(bytes: &[u8], salt: u64) -> u64 {
    const WORD: usize = size_of::<u64>();
    let mut mixed = step(salt, bytes.len() as u64);
    let mut at = 0;
    while at < bytes.len() {
        let (mut word, mut offset) = (0, 0);
        while offset < WORD && at + offset < bytes.len() {
            word |= (bytes[at + offset] as u64) << (8 * offset);
            offset += 1;
        }
        mixed = step(mixed, word);
        at += WORD;
    }
    mixed.wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

const fn step(mixed: u64, word: u64) -> u64 {
    let mixed = (mixed ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 29
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn salt_words_and_length_all_count() {
        let all = [
            mix([1, 2], 0),
            mix([2, 1], 0),
            mix([1, 2], 1),
            mix_bytes(b"", 0),
            mix_bytes(b"\0", 0),
            mix_bytes(b"uid-1", 0),
            mix_bytes(b"uid-2", 0),
            mix_bytes(b"uid-1", 1),
            mix_bytes(b"a text of more than a word", 0),
        ];
        let distinct: std::collections::BTreeSet<_> = all.into_iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    /// Nodes of different versions must agree: these numbers may never change.
    #[test]
    fn the_numbers_are_those_of_every_version() {
        assert_eq!([mix([1, 2], 3) >> 32, mix_bytes(b"uid", 3) >> 32], [0xfdf2_e3f3, 0x20f0_e734]);
    }
}
