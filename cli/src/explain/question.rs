//! A question as it is typed.

use std::fmt;
use std::net::IpAddr;

use crate::arguments::ExplainArgs;
use crate::failure::Failure;

/// Who dials what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// Who dials.
    pub(super) from: String,
    /// What is dialled: a name, or an address without brackets.
    pub(super) to: String,
    /// The port that is dialled.
    pub(super) port: u16,
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.to.parse::<std::net::Ipv6Addr>().is_ok() {
            write!(f, "{} -> [{}]:{}", self.from, self.to, self.port)
        } else {
            write!(f, "{} -> {}:{}", self.from, self.to, self.port)
        }
    }
}

impl Question {
    /// Reads `A -> B:port` as one argument, as two without the arrow, or as three.
    ///
    /// # Errors
    /// [`Failure::Usage`].
    pub(super) fn read(args: &ExplainArgs) -> Result<Self, Failure> {
        let typed: Vec<&str> = [Some(&args.from), args.arrow.as_ref(), args.to.as_ref()]
            .into_iter()
            .flatten()
            .map(String::as_str)
            .collect();
        match typed.as_slice() {
            [question] => {
                let (from, to) = question
                    .split_once("->")
                    .ok_or_else(|| usage(format!("{question:?} holds no `->`")))?;
                Self::of(from, to)
            }
            // The shell took `> B:port` for a redirection.
            [_, "-" | "->"] => Err(usage("nothing stands behind the arrow".to_owned())),
            [from, to] | [from, "->", to] => Self::of(from, to),
            [..] => Err(usage(format!("{:?} is no question", typed.join(" ")))),
        }
    }

    fn of(from: &str, to: &str) -> Result<Self, Failure> {
        let (from, to) = (from.trim(), to.trim());
        if from.is_empty() || from.contains(char::is_whitespace) {
            return Err(usage(format!("{from:?} is no source")));
        }
        let (host, port) =
            to.rsplit_once(':').ok_or_else(|| usage(format!("{to:?} has no port")))?;
        let port = port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| usage(format!("{port:?} is no port from 1 to 65535")))?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let is_name = |host: &str| {
            !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || "[]:".contains(c))
        };
        match bracketed {
            Some(address) if address.parse::<IpAddr>().is_ok() => {
                Ok(Self { from: without_brackets(from), to: address.to_owned(), port })
            }
            None if is_name(host) => {
                Ok(Self { from: without_brackets(from), to: host.to_owned(), port })
            }
            Some(_) | None => Err(usage(format!(
                "{host:?} is no destination; an IPv6 address stands in brackets before its port"
            ))),
        }
    }
}

fn without_brackets(from: &str) -> String {
    let inner = from.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    inner.filter(|inner| inner.parse::<IpAddr>().is_ok()).unwrap_or(from).to_owned()
}

fn usage(problem: String) -> Failure {
    let remedy = "culvert explain NAMESPACE/POD HOST:PORT, or in quotes: \
                  culvert explain 'NAMESPACE/POD -> HOST:PORT'";
    Failure::Usage { problem, remedy: remedy.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(typed: &[&str]) -> Result<String, String> {
        let mut typed = typed.iter().map(|text| (*text).to_owned());
        let args =
            ExplainArgs { from: typed.next().unwrap(), arrow: typed.next(), to: typed.next() };
        Question::read(&args)
            .map(|question| question.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_question_is_typed_in_one_two_or_three_words() {
        for (typed, expected) in [
            (&["shop/a -> web.shop:80"][..], "shop/a -> web.shop:80"),
            (&["shop/a->web.shop:80"], "shop/a -> web.shop:80"),
            (&["shop/a", "web.shop:80"], "shop/a -> web.shop:80"),
            (&["shop/a", "->", "shop/b:80"], "shop/a -> shop/b:80"),
            (&["10.0.0.1", "->", "10.0.0.2:5432"], "10.0.0.1 -> 10.0.0.2:5432"),
            (&["[fd00::1]", "[fd00::2]:80"], "fd00::1 -> [fd00::2]:80"),
            (&["fd00::1 -> [fd00::2]:80"], "fd00::1 -> [fd00::2]:80"),
            (
                &["Kubernetes//Pod/shop/a", "web.shop.svc.cluster.local:1"],
                "Kubernetes//Pod/shop/a -> web.shop.svc.cluster.local:1",
            ),
        ] {
            assert_eq!(read(typed).as_deref(), Ok(expected), "{typed:?}");
        }
    }

    #[test]
    fn what_is_no_question_is_told() {
        for (typed, problem) in [
            (&["shop/a"][..], "\"shop/a\" holds no `->`"),
            (&["shop/a", "-"], "nothing stands behind the arrow"),
            (&["shop/a", "->"], "nothing stands behind the arrow"),
            (&["shop/a", "web.shop"], "\"web.shop\" has no port"),
            (&["shop/a", "web.shop:0"], "\"0\" is no port from 1 to 65535"),
            (&["shop/a", "web.shop:65536"], "\"65536\" is no port from 1 to 65535"),
            (&["shop/a", "web.shop:http"], "\"http\" is no port from 1 to 65535"),
            (&[" -> web.shop:80"], "\"\" is no source"),
            (&["a", "b", "c:80"], "\"a b c:80\" is no question"),
            (
                &["a -> :80"],
                "\"\" is no destination; an IPv6 address stands in brackets before its port",
            ),
            (
                &["a -> fd00::2:80"],
                "\"fd00::2\" is no destination; an IPv6 address stands in brackets before its port",
            ),
        ] {
            assert_eq!(read(typed), Err(problem.to_owned()), "{typed:?}");
        }
    }
}
