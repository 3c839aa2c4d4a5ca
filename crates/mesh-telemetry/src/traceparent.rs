//! The `traceparent` header.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// A position in a distributed trace.
///
/// Source: W3C Trace Context, level 1, §3.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceParent {
    trace_id: u128,
    span_id: u64,
    flags: u8,
}

/// Text that is no `traceparent`; a new trace is begun then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid traceparent")]
pub struct InvalidTraceParent;

/// Version 00 is exactly that long, bytes.
const LENGTH: usize = 55;

impl TraceParent {
    /// A new trace from random numbers; zero, which the format reserves, becomes one.
    #[must_use]
    pub const fn new(trace_entropy: u128, span_entropy: u64) -> Self {
        Self {
            trace_id: if trace_entropy == 0 { 1 } else { trace_entropy },
            span_id: if span_entropy == 0 { 1 } else { span_entropy },
            flags: 0,
        }
    }

    /// The same trace with a new span below this one.
    #[must_use]
    pub const fn child(self, span_entropy: u64) -> Self {
        Self { span_id: if span_entropy == 0 { 1 } else { span_entropy }, ..self }
    }

    /// The trace, as 16 bytes.
    #[must_use]
    pub const fn trace_id(self) -> u128 {
        self.trace_id
    }

    /// The span, as 8 bytes.
    #[must_use]
    pub const fn span_id(self) -> u64 {
        self.span_id
    }

    /// True when the caller may have recorded the trace.
    #[must_use]
    pub const fn sampled(self) -> bool {
        self.flags & 1 == 1
    }
}

impl FromStr for TraceParent {
    type Err = InvalidTraceParent;

    fn from_str(text: &str) -> Result<Self, InvalidTraceParent> {
        let bytes = text.as_bytes();
        let separated = bytes.len() == LENGTH
            && [2, 35, 52].iter().all(|at| bytes.get(*at) == Some(&b'-'))
            && bytes.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-'));
        if !separated || !text.starts_with("00") {
            return Err(InvalidTraceParent);
        }
        let number = |range| text.get(range).ok_or(InvalidTraceParent);
        let trace_id =
            u128::from_str_radix(number(3..35)?, 16).map_err(|_not_hex| InvalidTraceParent)?;
        let span_id =
            u64::from_str_radix(number(36..52)?, 16).map_err(|_not_hex| InvalidTraceParent)?;
        let flags =
            u8::from_str_radix(number(53..55)?, 16).map_err(|_not_hex| InvalidTraceParent)?;
        if trace_id == 0 || span_id == 0 {
            return Err(InvalidTraceParent);
        }
        Ok(Self { trace_id, span_id, flags })
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, self.flags)
    }
}

impl Serialize for TraceParent {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_well_formed_text_is_a_traceparent() {
        let check = |text: &str, valid: bool| {
            assert_eq!(text.parse::<TraceParent>().is_ok(), valid, "{text}");
        };
        check("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", true);
        check("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00", true);
        check("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", false);
        check("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", false);
        check("00-00000000000000000000000000000000-00f067aa0ba902b7-01", false);
        check("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", false);
        check("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1", false);
        check("00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01", false);
        check("", false);
    }

    proptest! {
        #[test]
        fn formatting_and_parsing_agree(trace: u128, span: u64) {
            let parent = TraceParent::new(trace, span);
            prop_assert_eq!(parent.to_string().parse(), Ok(parent));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}|[0-9a-f-]{55}") {
            if let Ok(parent) = text.parse::<TraceParent>() {
                prop_assert_eq!(parent.to_string(), text);
            }
        }
    }
}
