//! An issuer of one's own, for tests: keys, key sets, tokens.

#![expect(clippy::unwrap_used, reason = "an issuer for tests")]

use std::fmt;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
    KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256,
    RSA_PSS_SHA384, RSA_PSS_SHA512, RsaEncoding, RsaKeyPair,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::Algorithm;

/// A key that signs.
pub struct Signer {
    id: String,
    algorithm: Algorithm,
    key: SigningKey,
}

enum SigningKey {
    Rsa(RsaKeyPair),
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Signer {
    /// A new key that signs by `algorithm` and is called `id`.
    ///
    /// # Panics
    /// When no key can be made.
    #[must_use]
    pub fn new(algorithm: Algorithm, id: &str) -> Self {
        let key = match algorithm {
            Algorithm::Es256 => {
                SigningKey::Ecdsa(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
            }
            Algorithm::Es384 => {
                SigningKey::Ecdsa(EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap())
            }
            Algorithm::EdDsa => SigningKey::Ed25519(Ed25519KeyPair::generate().unwrap()),
            Algorithm::Rs256
            | Algorithm::Rs384
            | Algorithm::Rs512
            | Algorithm::Ps256
            | Algorithm::Ps384
            | Algorithm::Ps512 => SigningKey::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()),
        };
        Self { id: id.to_owned(), algorithm, key }
    }

    /// An Ed25519 key from its seed: the same key each time.
    ///
    /// # Panics
    /// When the seed is none.
    #[must_use]
    pub fn ed25519(seed: &[u8; 32], id: &str) -> Self {
        let key = Ed25519KeyPair::from_seed_unchecked(seed).unwrap();
        Self { id: id.to_owned(), algorithm: Algorithm::EdDsa, key: SigningKey::Ed25519(key) }
    }

    /// The public key as a JSON Web Key, with its id and without its algorithm.
    #[must_use]
    pub fn jwk(&self) -> Value {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match &self.key {
            SigningKey::Rsa(key) => {
                let (n, e) = rsa_numbers(key.public_key().as_ref());
                json!({"kty": "RSA", "kid": self.id, "n": text(n), "e": text(e)})
            }
            SigningKey::Ecdsa(key) => {
                let point = &key.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                let curve = if self.algorithm == Algorithm::Es256 { "P-256" } else { "P-384" };
                json!({"kty": "EC", "crv": curve, "kid": self.id, "x": text(x), "y": text(y)})
            }
            SigningKey::Ed25519(key) => {
                let x = text(key.public_key().as_ref());
                json!({"kty": "OKP", "crv": "Ed25519", "kid": self.id, "x": x})
            }
        }
    }

    /// The public key as text, for whoever mistakes it for a secret.
    #[must_use]
    pub fn public(&self) -> Vec<u8> {
        match &self.key {
            SigningKey::Rsa(key) => key.public_key().as_ref().to_vec(),
            SigningKey::Ecdsa(key) => key.public_key().as_ref().to_vec(),
            SigningKey::Ed25519(key) => key.public_key().as_ref().to_vec(),
        }
    }

    /// A token with these claims.
    #[must_use]
    pub fn token(&self, claims: &Value) -> String {
        let header = json!({"alg": self.algorithm.as_str(), "kid": self.id, "typ": "JWT"});
        self.signed(&header, claims, self.algorithm)
    }

    /// A token with this header and these claims, signed by `algorithm`, whatever the header says.
    ///
    /// # Panics
    /// When the key does not sign by it.
    #[must_use]
    pub fn signed(&self, header: &Value, claims: &Value, algorithm: Algorithm) -> String {
        let signed = unsigned(header, claims);
        let random = SystemRandom::new();
        let signature = match &self.key {
            SigningKey::Rsa(key) => {
                let encoding: &'static dyn RsaEncoding = match algorithm {
                    Algorithm::Rs384 => &RSA_PKCS1_SHA384,
                    Algorithm::Rs512 => &RSA_PKCS1_SHA512,
                    Algorithm::Ps256 => &RSA_PSS_SHA256,
                    Algorithm::Ps384 => &RSA_PSS_SHA384,
                    Algorithm::Ps512 => &RSA_PSS_SHA512,
                    Algorithm::Rs256 | Algorithm::Es256 | Algorithm::Es384 | Algorithm::EdDsa => {
                        &RSA_PKCS1_SHA256
                    }
                };
                let mut signature = vec![0; key.public_modulus_len()];
                key.sign(encoding, &random, signed.as_bytes(), &mut signature).unwrap();
                signature
            }
            SigningKey::Ecdsa(key) => {
                key.sign(&random, signed.as_bytes()).unwrap().as_ref().to_vec()
            }
            SigningKey::Ed25519(key) => key.sign(signed.as_bytes()).as_ref().to_vec(),
        };
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// A key set of these.
#[must_use]
pub fn key_set(signers: &[&Signer]) -> String {
    json!({"keys": signers.iter().map(|signer| signer.jwk()).collect::<Vec<_>>()}).to_string()
}

/// Header and payload, without a signature.
#[must_use]
pub fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}

/// Modulus and exponent of an `RSAPublicKey` (RFC 8017 A.1.1): a sequence of two integers.
fn rsa_numbers(der: &[u8]) -> (&[u8], &[u8]) {
    let (sequence, _) = element(der);
    let (n, rest) = element(sequence);
    let (e, _) = element(rest);
    (n.strip_prefix(&[0]).unwrap_or(n), e)
}

/// Content of the first DER element, and what follows it.
fn element(der: &[u8]) -> (&[u8], &[u8]) {
    let (start, length) = match der[1] {
        0x81 => (3, usize::from(der[2])),
        0x82 => (4, usize::from(der[2]) << 8 | usize::from(der[3])),
        short => (2, usize::from(short)),
    };
    (&der[start..start + length], &der[start + length..])
}
