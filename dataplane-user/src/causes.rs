//! An error together with what caused it, as one line for people.

use std::error::Error;

/// An error and its causes, each said once.
pub fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    enum Failure {
        #[error("cannot open it: {0}. Is it there?")]
        Told(#[source] io::Error),
        #[error("cannot open it")]
        Untold(#[source] io::Error),
    }

    #[test]
    fn a_cause_that_the_error_tells_itself_is_not_said_again() {
        let cause = || io::Error::from_raw_os_error(libc::ENOENT);
        let told = causes(&Failure::Told(cause()));
        assert_eq!(told, "cannot open it: No such file or directory (os error 2). Is it there?");
        let untold = causes(&Failure::Untold(cause()));
        assert_eq!(untold, "cannot open it: No such file or directory (os error 2)");
    }
}
