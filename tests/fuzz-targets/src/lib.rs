//! Fuzz targets: one function per parser of bytes from outside, each with what must hold whatever the bytes are.
//!
//! The smoke test runs them over committed and mutated inputs; `cargo xtask fuzz` runs the same functions guided by coverage
//! (`tests/fuzz`). A target panics when the parser does, and when an invariant does not hold.

#![forbid(unsafe_code)]

pub mod certificate;
pub mod dns;
pub mod engine;
pub mod enroll;
mod fixture;
pub mod handover;
pub mod http2;
mod input;
pub mod jwt;
pub mod manifest;
mod net;
pub mod packet;
pub mod policy;
mod random;
pub mod resolve;
pub mod route;
pub mod text;
pub mod tls;
pub mod token;
pub mod xds;

pub use random::{Random, mutate};

/// A parser under test.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: of the corpus folder, and for `cargo xtask fuzz --target`.
    pub name: &'static str,
    /// Feeds it. Panics on a bug.
    pub run: fn(&[u8]),
    /// Inputs that reach far into it; the committed corpus holds them as `seed-N`.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

const fn target(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target { name, run, seeds }
}

/// Every target.
pub const TARGETS: &[Target] = &[
    target("tls_record", tls::record, tls::record_seeds),
    target("post_handshake", tls::post_handshake, tls::post_handshake_seeds),
    target("http2_frame", http2::frame, http2::frame_seeds),
    target("hpack", http2::hpack, http2::hpack_seeds),
    target("engine_server", engine::server, engine::server_seeds),
    target("engine_client", engine::client, engine::client_seeds),
    target("engine_state", handover::state, handover::state_seeds),
    target("request_head", engine::request_head, engine::request_head_seeds),
    target("authority", text::authority, text::authority_seeds),
    target("baggage", text::baggage, text::baggage_seeds),
    target("forwarded", text::forwarded, text::forwarded_seeds),
    target("traceparent", text::traceparent, text::traceparent_seeds),
    target("spiffe_id", text::spiffe_id, text::spiffe_id_seeds),
    target("ip_prefix", text::ip_prefix, text::ip_prefix_seeds),
    target("xds_resource", xds::resource, xds::resource_seeds),
    target("xds_client", xds::client, xds::client_seeds),
    target("xds_server", xds::server, xds::server_seeds),
    target("xds_requests", xds::requests, xds::requests_seeds),
    target("saved_state", xds::saved_state, xds::saved_state_seeds),
    target("certificate_request", xds::certificate_request, xds::certificate_request_seeds),
    target("dns_query", dns::query, dns::query_seeds),
    target("dns_cache", dns::cache, dns::cache_seeds),
    target("enrol_request", enroll::request, enroll::request_seeds),
    target("enrol_reply", enroll::reply, enroll::reply_seeds),
    target("cni", enroll::cni, enroll::cni_seeds),
    target("cni_conflist", enroll::conflist, enroll::conflist_seeds),
    target("manifest_yaml", manifest::yaml, manifest::yaml_seeds),
    target("manifest_json", manifest::json, manifest::json_seeds),
    target("token", token::token, token::token_seeds),
    target("token_claims", token::claims, token::claims_seeds),
    target("jwt_token", jwt::token, jwt::token_seeds),
    target("jwt_request", jwt::request, jwt::request_seeds),
    target("jwt_keys", jwt::keys, jwt::keys_seeds),
    target("certificate", certificate::chain, certificate::chain_seeds),
    target("trust_bundle", certificate::trust_bundle, certificate::trust_bundle_seeds),
    target("revocation_list", certificate::revocation_list, certificate::revocation_list_seeds),
    target("csr", certificate::csr, certificate::csr_seeds),
    target("csr_answer", certificate::answer, certificate::answer_seeds),
    target("kept_certificate", certificate::kept, certificate::kept_seeds),
    target("packet", packet::packet, packet::packet_seeds),
    target("policy", policy::policy, policy::policy_seeds),
    target("path_template", text::path_template, text::path_template_seeds),
    target("resolve", resolve::resolve, resolve::resolve_seeds),
    target("request_path", route::request_path, route::request_path_seeds),
    target("route_table", route::route_table, route::route_table_seeds),
    target("spoken", text::spoken, text::spoken_seeds),
    target("http1_strict", text::http1_strict, text::http1_strict_seeds),
];
