//! Errors as one line of text.

use std::error::Error;

/// The text of an error and of everything behind it, separated by colons.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(behind) = source {
        text.push_str(": ");
        text.push_str(&behind.to_string());
        source = behind.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Self>>,
    }

    #[test]
    fn everything_behind_an_error_is_told_in_order() {
        let layer = |text, source: Option<Layer>| Layer { text, source: source.map(Box::new) };
        let error = layer("no answer", Some(layer("no route", Some(layer("ENETUNREACH", None)))));
        assert_eq!(error_chain(&error), "no answer: no route: ENETUNREACH");
        assert_eq!(error_chain(&layer("alone", None)), "alone");
    }
}
