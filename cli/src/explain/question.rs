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
    /// Method and path of a request.
    pub(super) request: Option<(String, String)>,
    /// Its headers, one a line.
    pub(super) headers: String,
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.to.parse::<std::net::Ipv6Addr>().is_ok() {
            write!(f, "{} -> [{}]:{}", self.from, self.to, self.port)?;
        } else {
            write!(f, "{} -> {}:{}", self.from, self.to, self.port)?;
        }
        match &self.request {
            Some((method, path)) => write!(f, " {method} {path}"),
            None => Ok(()),
        }
    }
}

impl Question {
    /// Reads `A -> B:port [METHOD /path]` as one argument, or as several with or without the arrow.
    ///
    /// # Errors
    /// [`Failure::Usage`].
    pub(super) fn read(args: &ExplainArgs) -> Result<Self, Failure> {
        let given = [
            Some(&args.from),
            args.arrow.as_ref(),
            args.to.as_ref(),
            args.method.as_ref(),
            args.path.as_ref(),
        ];
        let mut typed: Vec<&str> = given.into_iter().flatten().map(String::as_str).collect();
        let mut request = None;
        if let [.., method, path] = typed.as_slice()
            && is_request(method, path)
        {
            request = Some(((*method).to_owned(), (*path).to_owned()));
            typed.truncate(typed.len() - 2);
        }
        let mut question = match typed.as_slice() {
            [question] => {
                let (from, to) = question
                    .split_once("->")
                    .ok_or_else(|| usage(format!("{question:?} holds no `->`")))?;
                let words: Vec<&str> = to.split_whitespace().collect();
                match words.as_slice() {
                    [to, method, path] if is_request(method, path) => {
                        request = Some(((*method).to_owned(), (*path).to_owned()));
                        Self::of(from, to)
                    }
                    [..] => Self::of(from, to),
                }
            }
            // The shell took `> B:port` for a redirection.
            [_, "-" | "->"] => Err(usage("nothing stands behind the arrow".to_owned())),
            [from, to] | [from, "->", to] => Self::of(from, to),
            [..] => Err(usage(format!("{:?} is no question", typed.join(" ")))),
        }?;
        if request.is_none() && !args.headers.is_empty() {
            return Err(usage("a header needs a method and a path".to_owned()));
        }
        question.request = request;
        question.headers = args.headers.join("\n");
        Ok(question)
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
                Ok(Self::connection(from, address, port))
            }
            None if is_name(host) => Ok(Self::connection(from, host, port)),
            Some(_) | None => Err(usage(format!(
                "{host:?} is no destination; an IPv6 address stands in brackets before its port"
            ))),
        }
    }
}

impl Question {
    fn connection(from: &str, to: &str, port: u16) -> Self {
        let (from, to) = (without_brackets(from), to.to_owned());
        Self { from, to, port, request: None, headers: String::new() }
    }
}

/// A method and an absolute path.
fn is_request(method: &str, path: &str) -> bool {
    path.starts_with('/')
        && !method.is_empty()
        && method.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'-')
}

fn without_brackets(from: &str) -> String {
    let inner = from.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    inner.filter(|inner| inner.parse::<IpAddr>().is_ok()).unwrap_or(from).to_owned()
}

fn usage(problem: String) -> Failure {
    let remedy = "culvert explain NAMESPACE/POD HOST:PORT [METHOD /PATH], or in quotes: \
                  culvert explain 'NAMESPACE/POD -> HOST:PORT'";
    Failure::Usage { problem, remedy: remedy.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(typed: &[&str]) -> Result<String, String> {
        let mut typed = typed.iter().map(|text| (*text).to_owned());
        let args = ExplainArgs {
            from: typed.next().unwrap(),
            arrow: typed.next(),
            to: typed.next(),
            method: typed.next(),
            path: typed.next(),
            headers: Vec::new(),
        };
        Question::read(&args)
            .map(|question| question.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_question_is_typed_in_one_two_or_three_words() {
        for (typed, expected) in [
            (&["shop/a -> web.shop:80"][..], "shop/a -> web.shop:80"),
            (&["shop/a->web.shop:80"], "shop/a -> web.shop:80"),
            (&["shop/a -> web.shop:80 GET /x"], "shop/a -> web.shop:80 GET /x"),
            (&["shop/a", "web.shop:80", "GET", "/x"], "shop/a -> web.shop:80 GET /x"),
            (&["shop/a", "->", "web.shop:80", "GET", "/x"], "shop/a -> web.shop:80 GET /x"),
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
