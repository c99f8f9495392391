//! Functions that the verifier walks once for a program, and not once for each way that leads to a call: what BPF calls global. It knows
//! nothing of their arguments but types (Linux 5.6; pointers to memory since 5.12), and nothing of their result but that it is a number.
//! What they are given a pointer to can be no key and no value of a map before Linux 6.2: those lie on the stack or in a map that was asked.

/// What a global function may give back, as the number that the verifier asks for.
pub trait Answer {
    /// As a number.
    fn number(self) -> u32;
    /// What a number stands for.
    fn of(number: u32) -> Self;
}

impl Answer for () {
    #[inline(always)]
    fn number(self) -> u32 {
        0
    }

    #[inline(always)]
    fn of(_number: u32) {}
}

impl Answer for bool {
    #[inline(always)]
    fn number(self) -> u32 {
        self as u32
    }

    #[inline(always)]
    fn of(number: u32) -> Self {
        number != 0
    }
}

impl Answer for u32 {
    #[inline(always)]
    fn number(self) -> u32 {
        self
    }

    #[inline(always)]
    fn of(number: u32) -> Self {
        number
    }
}

/// The reference that an argument is inside.
macro_rules! reference {
    (const $type:ty) => {
        &$type
    };
    (mut $type:ty) => {
        &mut $type
    };
}
pub(crate) use reference;

/// The reference that a pointer is, if it is not null.
macro_rules! refer {
    (const $pointer:ident) => {
        $pointer.as_ref()
    };
    (mut $pointer:ident) => {
        $pointer.as_mut()
    };
}
pub(crate) use refer;

/// Defines a global function: its name for callers, its symbol (`as`), and its arguments: first those by reference, `const` or `mut`, to
/// memory of their type, then, behind a semicolon, numbers.
macro_rules! global {
    (
        $(#[$attribute:meta])*
        $vis:vis fn $name:ident as $symbol:ident(
            $($arg:ident: $kind:tt $type:ty),* $(; $($number:ident: $plain:ty),+)?
        ) $(-> $answer:ty)? $body:block
    ) => {
        $(#[$attribute])*
        #[inline(always)]
        $vis fn $name($($arg: $crate::global::reference!($kind $type),)* $($($number: $plain),+)?) $(-> $answer)? {
            #[inline(always)]
            fn body($($arg: $crate::global::reference!($kind $type),)* $($($number: $plain),+)?) $(-> $answer)? $body

            #[unsafe(no_mangle)]
            #[inline(never)]
            unsafe extern "C" fn $symbol($($arg: *$kind $type,)* $($($number: $plain),+)?) -> u32 {
                $(
                    // SAFETY: the only caller passes a reference. The verifier does not know that it is not null.
                    let Some($arg) = (unsafe { $crate::global::refer!($kind $arg) }) else { return 0 };
                )*
                $crate::global::Answer::number(body($($arg,)* $($($number),+)?))
            }

            // SAFETY: references to memory that outlives the call.
            $crate::global::Answer::of(unsafe { $symbol($(&raw $kind *$arg,)* $($($number),+)?) })
        }
    };
}
pub(crate) use global;
