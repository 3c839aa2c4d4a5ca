//! Why a request is refused for its token.

use std::fmt;

/// What is wrong with a token, or with what it would be judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rejection {
    /// It is not what RFC 7515 and RFC 7519 describe.
    Malformed(&'static str),
    /// No rule of where it stands knows its issuer.
    UnknownIssuer,
    /// The issuer's keys do not verify by its algorithm; `none` and the symmetric ones are nobody's.
    Algorithm,
    /// The issuer has no key of its name, or no key that it was signed with.
    UnknownKey,
    /// Its signature is not its key's.
    Signature,
    /// Its time is over.
    Expired,
    /// Its time has not come.
    NotYetValid,
    /// It is meant for others.
    Audience,
    /// There are more tokens in the request than are looked at.
    TooMany,
    /// The issuer's keys were never read.
    NoKeys,
}

impl Rejection {
    /// One word, for logs, metrics and the answer.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Malformed(_) => "token_malformed",
            Self::UnknownIssuer => "token_unknown_issuer",
            Self::Algorithm => "token_algorithm",
            Self::UnknownKey => "token_unknown_key",
            Self::Signature => "token_signature",
            Self::Expired => "token_expired",
            Self::NotYetValid => "token_not_yet_valid",
            Self::Audience => "token_audience",
            Self::TooMany => "token_too_many",
            Self::NoKeys => "token_keys_unavailable",
        }
    }

    /// True when other keys of the same issuer might think otherwise.
    #[must_use]
    pub const fn may_be_stale_keys(self) -> bool {
        match self {
            Self::UnknownKey | Self::NoKeys => true,
            Self::Malformed(_)
            | Self::UnknownIssuer
            | Self::Algorithm
            | Self::Signature
            | Self::Expired
            | Self::NotYetValid
            | Self::Audience
            | Self::TooMany => false,
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed(what) => what,
            Self::UnknownIssuer => "no rule knows the token's issuer",
            Self::Algorithm => "the issuer's keys do not verify by the token's algorithm",
            Self::UnknownKey => "the issuer has no key that the token was signed with",
            Self::Signature => "the token's signature is not its key's",
            Self::Expired => "the token has expired",
            Self::NotYetValid => "the token is not valid yet",
            Self::Audience => "the token is meant for another audience",
            Self::TooMany => "there are too many tokens in the request",
            Self::NoKeys => "the issuer's keys could not be read yet",
        })
    }
}
