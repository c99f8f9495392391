//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624), on native words.

use crate::Addr;

/// The lower half of a word.
const LOW: u64 = 0xffff_ffff;

/// A ones' complement sum that has not been folded.
///
/// Words are summed in memory order: the ones' complement sum does not care for byte order (RFC 1071 section 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(pub u64);

impl Sum {
    /// Adds the bytes of a slice; an odd last byte counts as if a zero followed.
    #[must_use]
    #[inline(always)]
    pub fn plus(mut self, bytes: &[u8]) -> Self {
        // Four at a time is the same modulo 2^16 - 1, and half the steps.
        let (words, rest) = bytes.as_chunks::<4>();
        for word in words {
            self.0 += u64::from(u32::from_ne_bytes(*word));
        }
        let (pairs, rest) = rest.as_chunks::<2>();
        for pair in pairs {
            self.0 += u64::from(u16::from_ne_bytes(*pair));
        }
        if let [last] = rest {
            self.0 += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        self
    }

    /// Takes the bytes of a slice of even length away.
    #[must_use]
    #[inline(always)]
    pub fn minus(mut self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        for word in words {
            self.0 += u64::from(!u32::from_ne_bytes(*word));
        }
        let (pairs, _) = rest.as_chunks::<2>();
        for pair in pairs {
            self.0 += u64::from(!u16::from_ne_bytes(*pair));
        }
        self
    }

    /// Adds an address: the whole of its 16 bytes, of which the first twelve add nothing where it is IPv4 (they sum to minus
    /// zero). Four bytes at a time, which is the same modulo 2^16 - 1.
    #[must_use]
    #[inline(always)]
    pub const fn plus_address(self, addr: &Addr) -> Self {
        let [a, b] = addr.words();
        Self(self.0 + (a & LOW) + (a >> 32) + (b & LOW) + (b >> 32))
    }

    /// Takes an address away, as [`Sum::plus_address`] adds it.
    #[must_use]
    #[inline(always)]
    pub const fn minus_address(self, addr: &Addr) -> Self {
        let [a, b] = addr.words();
        let (a, b) = (!a, !b);
        Self(self.0 + (a & LOW) + (a >> 32) + (b & LOW) + (b >> 32))
    }

    /// The sum in 32 bits, as the kernel's helpers take it (`__wsum`).
    #[must_use]
    #[inline(always)]
    pub const fn wide(self) -> u32 {
        let s = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((s & 0xffff_ffff) + (s >> 32)) as u32
    }

    /// The sum in 16 bits, in memory order.
    #[must_use]
    #[inline(always)]
    pub const fn fold(self) -> u16 {
        let mut s = self.0;
        s = (s & 0xffff_ffff) + (s >> 32);
        s = (s & 0xffff) + (s >> 16);
        s = (s & 0xffff) + (s >> 16);
        s = (s & 0xffff) + (s >> 16);
        s as u16
    }

    /// The checksum field of data with this sum, as its two bytes stand in the packet.
    #[must_use]
    #[inline(always)]
    pub const fn checksum(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }
}

/// The checksum field after the covered data changed by `delta` (new bytes added, old bytes subtracted).
///
/// RFC 1624 equation 3: `HC' = ~(~HC + ~m + m')`.
#[must_use]
#[inline(always)]
pub const fn update(field: [u8; 2], delta: Sum) -> [u8; 2] {
    Sum((!u16::from_ne_bytes(field)) as u64 + delta.0).checksum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_1071_sums_right() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().plus(&data).checksum(), [!0xdd, !0xf2]);
    }

    #[test]
    fn an_update_equals_a_sum_from_scratch() {
        let mut data =
            [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
        let field = Sum::default().plus(&data).checksum();
        for value in [[0, 0, 0, 0], [255; 4], [10, 96, 0, 1], [0, 0, 0xff, 0xff]] {
            let before = data;
            data[16..20].copy_from_slice(&value);
            let delta = Sum::default().minus(&before[16..20]).plus(&data[16..20]);
            let updated = Sum::default().plus(&data).plus(&update(field, delta)).fold();
            assert_eq!(updated, 0xffff, "{value:?}");
            data = before;
        }
    }

    #[test]
    fn an_address_counts_as_its_bytes() {
        for bytes in [[0; 16], [0xff; 16], *b"0123456789abcdef", *Addr::from_v4([10, 96, 0, 1]).bytes()] {
            let addr = Addr::from_bytes(bytes);
            let sums = [Sum(7).plus_address(&addr), Sum(7).plus(&bytes)];
            assert_eq!(sums[0].fold(), sums[1].fold());
            let sums = [Sum(7).minus_address(&addr), Sum(7).minus(&bytes)];
            assert_eq!(sums[0].fold(), sums[1].fold());
        }
        let v4 = Sum(7).plus_address(&Addr::from_v4([10, 96, 0, 1]));
        assert_eq!(v4.fold(), Sum(7).plus(&[10, 96, 0, 1]).fold());
    }

    #[test]
    fn an_odd_byte_counts_as_if_a_zero_followed() {
        assert_eq!(Sum::default().plus(&[1, 2, 3]).fold(), Sum::default().plus(&[1, 2, 3, 0]).fold());
    }
}
