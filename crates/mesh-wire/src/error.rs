//! Why a resource was refused.

/// A resource that does not convert: which field, what is wrong with it. The sender's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}; {}", .problem.remedy())]
pub struct InvalidResource {
    /// The field, as a path from the resource, e.g. `services[shop/cart.shop.svc].ports[0].target_port`.
    pub field: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Not set, or empty.
    #[error("missing")]
    Missing,
    /// A number that names no value of the enum.
    #[error("unknown value {value}")]
    UnknownValue {
        /// The number.
        value: i32,
    },
    /// A value that is known and not supported.
    #[error("unsupported value {value}")]
    Unsupported {
        /// Its name.
        value: &'static str,
    },
    /// An address of neither family.
    #[error("address of {bytes} bytes")]
    AddressLength {
        /// How many.
        bytes: usize,
    },
    /// A prefix longer than the address, or text that is no prefix.
    #[error("not an IP prefix: {text:?}")]
    Prefix {
        /// What was given.
        text: String,
    },
    /// Not a TCP port.
    #[error("not a port: {value}")]
    Port {
        /// What was given.
        value: u32,
    },
    /// A name of the wrong shape.
    #[error("malformed name {text:?}")]
    Name {
        /// What was given.
        text: String,
    },
    /// Names that make no SPIFFE identity.
    #[error("no SPIFFE identity can be made of it")]
    Identity,
    /// The resource bears another name than its content.
    #[error("content is of {content:?}")]
    OtherName {
        /// The name its content implies.
        content: String,
    },
    /// Content of another type than the one asked for.
    #[error("content of type {type_url:?}")]
    OtherType {
        /// The type of the content.
        type_url: String,
    },
    /// Bytes that do not decode.
    #[error("does not decode")]
    Undecodable,
    /// Text that is not the JSON it should be.
    #[error("{text}")]
    Json {
        /// What is wrong, and where in the text.
        text: String,
    },
    /// An extension that changes the meaning and is not known.
    #[error("unknown extension {name:?}")]
    UnknownExtension {
        /// Its name.
        name: String,
    },
}

impl Problem {
    /// What the sender should do about it.
    #[must_use]
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Missing => "set it",
            Self::UnknownValue { .. } => "use a value this version knows, or upgrade the agent",
            Self::Unsupported { .. } => "use another value",
            Self::AddressLength { .. } => "send 4 bytes for IPv4 or 16 for IPv6",
            Self::Prefix { .. } => "send an address, or a CIDR no longer than the address",
            Self::Port { .. } => "send a port from 1 to 65535",
            Self::Name { .. } => "send namespace/name",
            Self::Identity => "use namespace and account names that Kubernetes would accept",
            Self::OtherName { .. } => "name the resource after its content",
            Self::OtherType { .. } => "send the type that was asked for",
            Self::Undecodable => "send a well-formed message",
            Self::Json { .. } => "send what this version knows, or upgrade the waypoint",
            Self::UnknownExtension { .. } => "leave it out, or upgrade the agent",
        }
    }
}

impl InvalidResource {
    pub(crate) fn new(field: impl Into<String>, problem: Problem) -> Self {
        Self { field: field.into(), problem }
    }

    /// Puts `outer` in front of the field.
    pub(crate) fn within(mut self, outer: impl std::fmt::Display) -> Self {
        self.field = if self.field.is_empty() {
            outer.to_string()
        } else {
            format!("{outer}.{}", self.field)
        };
        self
    }
}

/// The value of a set enum field.
pub(crate) fn known<E: TryFrom<i32>>(field: &str, value: i32) -> Result<E, InvalidResource> {
    E::try_from(value)
        .map_err(|_unknown| InvalidResource::new(field, Problem::UnknownValue { value }))
}

/// Text that must not be empty.
pub(crate) fn required<'a>(field: &str, text: &'a str) -> Result<&'a str, InvalidResource> {
    if text.is_empty() { Err(InvalidResource::new(field, Problem::Missing)) } else { Ok(text) }
}

/// Converts a list, naming the element that fails.
pub(crate) fn each<T, U>(
    field: &str,
    items: &[T],
    mut convert: impl FnMut(&T) -> Result<U, InvalidResource>,
) -> Result<Vec<U>, InvalidResource> {
    items
        .iter()
        .enumerate()
        .map(|(index, item)| {
            convert(item).map_err(|error| error.within(format_args!("{field}[{index}]")))
        })
        .collect()
}
