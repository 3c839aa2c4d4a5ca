//! Regular expressions, bounded: matching takes time linear in the text, compiling a bounded amount of memory.

use regex::bytes::{Regex, RegexBuilder};
use regex_syntax::hir::{Hir, HirKind};

/// Longest expression. Bytes; the API's own bound for most fields.
const MAX_PATTERN_BYTES: usize = 4096;
/// Most memory of a compiled expression. Bytes; `\w{100}` of Unicode, for one, does not fit.
const MAX_PROGRAM_BYTES: usize = 256 * 1024;
/// Most memory of the states that matching keeps per expression. Bytes; beyond, matching is slower and needs none.
const MAX_CACHE_BYTES: usize = 256 * 1024;
const MAX_NESTING: u32 = 64;

/// An expression that must match the whole text.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    whole: Regex,
    /// What every text that it matches begins with.
    literal_start: Box<str>,
    length: usize,
}

/// An expression that is not one, or is too large.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InvalidPattern {
    /// Longer than 4,096 bytes.
    #[error("the expression is longer than {MAX_PATTERN_BYTES} bytes")]
    TooLong,
    /// It does not parse. Back-references and look-around are not supported, since they cannot be bounded.
    #[error("the expression cannot be read")]
    Syntax(#[source] Box<regex_syntax::Error>),
    /// It does not fit into 256 KiB when compiled.
    #[error("the expression is too large when compiled")]
    TooLarge(#[source] regex::Error),
}

impl Pattern {
    pub(crate) fn new(text: &str) -> Result<Self, InvalidPattern> {
        if text.len() > MAX_PATTERN_BYTES {
            return Err(InvalidPattern::TooLong);
        }
        // By itself first: wrapped, `a)(b` would be an expression.
        let mut parser = regex_syntax::ParserBuilder::new().nest_limit(MAX_NESTING).build();
        let hir = parser.parse(text).map_err(|error| InvalidPattern::Syntax(Box::new(error)))?;
        // The line break ends a comment of `(?x)`, and is a blank to it otherwise; `\A` and `\z` mind no `(?m)`.
        let wrapped = if text.contains("(?") && text.contains('#') {
            format!(r"\A(?:{text}{}){}", "\n", r"\z")
        } else {
            format!(r"\A(?:{text})\z")
        };
        let whole = RegexBuilder::new(&wrapped)
            .size_limit(MAX_PROGRAM_BYTES)
            .dfa_size_limit(MAX_CACHE_BYTES)
            .nest_limit(MAX_NESTING + 8)
            .build()
            .map_err(InvalidPattern::TooLarge)?;
        Ok(Self { whole, literal_start: literal_start(&hir), length: text.chars().count() })
    }

    pub(crate) fn matches(&self, text: &[u8]) -> bool {
        self.whole.is_match(text)
    }

    pub(crate) const fn literal_start(&self) -> &str {
        &self.literal_start
    }

    /// Of the expression. Characters.
    pub(crate) const fn length(&self) -> usize {
        self.length
    }
}

/// The literal text that an expression begins with. Letters that match in either case are no literals of the parser.
fn literal_start(hir: &Hir) -> Box<str> {
    let literal = |hir: &Hir| match hir.kind() {
        HirKind::Literal(literal) => std::str::from_utf8(&literal.0).ok().map(Box::from),
        HirKind::Empty
        | HirKind::Class(_)
        | HirKind::Look(_)
        | HirKind::Repetition(_)
        | HirKind::Capture(_)
        | HirKind::Concat(_)
        | HirKind::Alternation(_) => None,
    };
    let start = match hir.kind() {
        // `^` takes no text away.
        HirKind::Concat(parts) => parts
            .iter()
            .find(|part| !matches!(part.kind(), HirKind::Look(regex_syntax::hir::Look::Start)))
            .and_then(literal),
        HirKind::Literal(_) => literal(hir),
        HirKind::Empty
        | HirKind::Class(_)
        | HirKind::Look(_)
        | HirKind::Repetition(_)
        | HirKind::Capture(_)
        | HirKind::Alternation(_) => None,
    };
    start.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_match_the_whole_text() {
        for (pattern, text, matches) in [
            ("/a", "/a", true),
            ("/a", "/ab", false),
            ("/a|/b", "/bc", false),
            ("^/a$", "/a", true),
            ("/a/.*", "/a/b/c", true),
            ("(?i)/A", "/a", true),
            ("(?m)a$", "a\nb", false),
            ("", "", true),
            (r"v\d+", "v12", true),
        ] {
            let found = Pattern::new(pattern).unwrap().matches(text.as_bytes());
            assert_eq!(found, matches, "{pattern} {text}");
        }
        let commented = Pattern::new("(?x)a # the letter").unwrap();
        assert!(commented.matches(b"a") && !commented.matches(b"b"));
    }

    #[test]
    fn the_literal_start_is_what_every_match_begins_with() {
        for (pattern, start) in [
            ("/v1/items/[0-9]+", "/v1/items/"),
            ("^/v1/.*", "/v1/"),
            ("/a", "/a"),
            ("/ab?", "/a"),
            ("/a|/b", ""),
            ("(?i)/a", "/"),
            (".*", ""),
            ("(/a)/b", ""),
        ] {
            assert_eq!(Pattern::new(pattern).unwrap().literal_start(), start, "{pattern}");
        }
    }

    #[test]
    fn unbounded_expressions_are_refused() {
        let long = "a".repeat(MAX_PATTERN_BYTES + 1);
        assert_eq!(Pattern::new(&long).unwrap_err(), InvalidPattern::TooLong);
        for pattern in ["(", "a)(b", r"(a)\1", "(?=a)", "["] {
            let error = Pattern::new(pattern).unwrap_err();
            assert!(matches!(error, InvalidPattern::Syntax(_)), "{pattern} {error:?}");
        }
        let deep = format!("{}a{}", "(".repeat(100), ")".repeat(100));
        assert!(matches!(Pattern::new(&deep).unwrap_err(), InvalidPattern::Syntax(_)));
        for pattern in [r"\w{500}", "((a{100}){100}){100}"] {
            let error = Pattern::new(pattern).unwrap_err();
            assert!(matches!(error, InvalidPattern::TooLarge(_)), "{pattern} {error:?}");
        }
    }
}
