//! Values of one word, which one side writes while the other reads: what must agree lies in one of them.

use bytemuck::Pod;

/// Reads a value of one word by one load. Field by field it would be two, which can see two values.
///
/// # Safety
/// `value` must be valid for reads, and aligned as a word is.
#[inline(always)]
pub unsafe fn read_word<T: Pod>(value: *const T) -> T {
    // SAFETY: the caller promises it. That the sizes are the same is asserted where `T` is known.
    bytemuck::must_cast(unsafe { value.cast::<u64>().read_volatile() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::EndpointSet;

    #[test]
    fn a_word_is_read_as_it_was_written() {
        let set = EndpointSet::new(7, 9);
        // SAFETY: a whole value on the stack, aligned by its type.
        assert_eq!(unsafe { read_word(&raw const set) }, set);
    }
}
