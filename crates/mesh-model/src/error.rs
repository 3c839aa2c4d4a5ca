//! Errors as one line of text.

use std::error::Error;

/// The text of an error and of everything behind it, separated by colons. What an error says of its source itself is not
/// said again.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(behind) = source {
        let told = behind.to_string();
        if !ends_with_words(&text, &told) {
            text.push_str(": ");
            text.push_str(&told);
        }
        source = behind.source();
    }
    text
}

/// Whether `text` ends with `end`, and that does not begin within a word.
fn ends_with_words(text: &str, end: &str) -> bool {
    text.strip_suffix(end).is_some_and(|before| !before.ends_with(char::is_alphanumeric))
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

    #[test]
    fn what_an_error_says_of_its_source_is_told_once() {
        let layer = |text, source: Option<Layer>| Layer { text, source: source.map(Box::new) };
        let refused = || Some(layer("connection refused", None));
        let twice = layer("tcp connect error", Some(layer("tcp connect error", refused())));
        assert_eq!(
            error_chain(&layer("transport error", Some(twice))),
            "transport error: tcp connect error: connection refused"
        );
        let itself = layer("no answer: connection refused", refused());
        assert_eq!(error_chain(&itself), "no answer: connection refused");
        // Not the end of a word, and not in the middle.
        assert_eq!(error_chain(&layer("no route", Some(layer("oute", None)))), "no route: oute");
        let middle = layer("connection refused by a.example", refused());
        assert_eq!(error_chain(&middle), "connection refused by a.example: connection refused");
    }
}
