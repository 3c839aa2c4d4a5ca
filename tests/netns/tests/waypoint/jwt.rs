//! Tokens in requests, by real keys: who passes, who does not, and what the server sees.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mesh_jwt::Algorithm;
use mesh_jwt::mint::{Signer, key_set, unsigned};
use mesh_netns::manifest::{authorization_policy, http_route, of_service, request_authentication};
use mesh_netns::process::run;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Process, servers};
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};

use crate::shop::{CART, Shop, at_service, equal, header};

const ISSUER: &str = "https://issuer.example";

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// Claims of a good token, and others in their place.
fn claims(others: &Value) -> Value {
    let mut claims = json!({
        "iss": ISSUER, "sub": "alice", "aud": ["shop", "more"], "exp": now() + 600, "nbf": now() - 10,
        "realm": { "roles": ["reader", "writer"] }, "scope": "read write", "admin": true,
    });
    for (name, value) in others.as_object().into_iter().flatten() {
        if value.is_null() {
            claims.as_object_mut().map(|all| all.remove(name));
        } else {
            claims[name] = value.clone();
        }
    }
    claims
}

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}")
}

fn at(service: &str, rule: &Value) -> Value {
    json!({ "targetRefs": [{ "group": "", "kind": "Service", "name": service }], "jwtRules": [rule] })
}

fn inline(signers: &[&Signer]) -> Value {
    json!({ "issuer": ISSUER, "audiences": ["shop"], "jwks": key_set(signers) })
}

fn url(path: &str) -> String {
    format!("http://{CART}:83{path}")
}

/// The status of a request of the client with a token.
fn with_token(shop: &Shop, token: &str) -> anyhow::Result<u16> {
    shop.status("client", &url("/"), &["-H", &bearer(token)])
}

/// No token passes, a good one does, and each bad one is refused with its reason: in the answer, the log and the metrics.
pub(crate) fn matrix(shop: &mut Shop) -> anyhow::Result<()> {
    let signers: Vec<Signer> =
        Algorithm::ALL.into_iter().map(|one| Signer::new(one, one.as_str())).collect();
    let rsa = &signers[0];
    let object = request_authentication(
        "shop",
        "jwt",
        &at("cart", &inline(&signers.iter().collect::<Vec<_>>())),
    );
    let skip = shop.log().len();
    shop.with(
        &object,
        "the rules being in force",
        |shop| Ok(with_token(shop, "x")? == 401),
        |shop| {
            equal("no token", shop.status("client", &url("/"), &[])?, 200)?;
            equal("another scheme", shop.status("client", &url("/"), &["-u", "a:b"])?, 200)?;
            for (signer, algorithm) in signers.iter().zip(Algorithm::ALL) {
                let token = signer.token(&claims(&json!({})));
                equal(algorithm.as_str(), with_token(shop, &token)?, 200)?;
            }
            let stranger = Signer::new(Algorithm::Rs256, "RS256");
            let nobody = Signer::new(Algorithm::Rs256, "nobody");
            let plain = claims(&json!({}));
            let none = json!({ "alg": "none", "kid": "RS256" });
            let shared = unsigned(&json!({ "alg": "HS256", "kid": "RS256" }), &plain);
            let key = hmac::Key::new(hmac::HMAC_SHA256, &rsa.public());
            let tag = URL_SAFE_NO_PAD.encode(hmac::sign(&key, shared.as_bytes()));
            let other = |others: Value| rsa.token(&claims(&others));
            for (what, token, reason) in [
                ("expired", other(json!({ "exp": now() - 61 })), "token_expired"),
                ("not yet valid", other(json!({ "nbf": now() + 120 })), "token_not_yet_valid"),
                ("wrong issuer", other(json!({ "iss": "https://evil" })), "token_unknown_issuer"),
                ("wrong audience", other(json!({ "aud": "bank" })), "token_audience"),
                ("no audience", other(json!({ "aud": null })), "token_audience"),
                ("wrong key", stranger.token(&plain), "token_signature"),
                ("unknown key", nobody.token(&plain), "token_unknown_key"),
                ("alg none", format!("{}.", unsigned(&none, &plain)), "token_algorithm"),
                ("HS with the public key", format!("{shared}.{tag}"), "token_algorithm"),
                ("garbage", "a.b.c".to_owned(), "token_malformed"),
            ] {
                let told = shop.get("client", &url("/"), &["-i", "-H", &bearer(&token)])?.stdout;
                let told = told.to_lowercase();
                let wanted = format!(
                    "www-authenticate: bearer error=\"invalid_token\", error_description=\"{reason}\""
                );
                ensure!(
                    told.starts_with("http/1.1 401") && told.contains(&wanted),
                    "{what}: {told}"
                );
                ensure!(told.contains(&format!("culvert-reason: {reason}")), "{what}: {told}");
                shop.line(skip, &[&format!("reason={reason}"), "status=401"])
                    .with_context(|| what.to_owned())?;
                let counted =
                    shop.sum("culvert_waypoint_refused_total", &[("reason", reason)])?;
                ensure!(counted >= 1.0, "{what} is not counted");
            }
            let line = shop.line(skip, &["reason=token_expired"])?;
            ensure!(
                line.contains("policy=\"RequestAuthentication shop/jwt\" rule=0"),
                "{line}"
            );
            shop.line(skip, &[&format!("request.principal=\"{ISSUER}/alice\""), "status=200"])?;
            let expired = other(json!({ "exp": now() - 61 }));
            let http2 = ["--http2-prior-knowledge", "-H", &bearer(&expired)];
            equal("HTTP/2", shop.status("client", &url("/"), &http2)?, 401)?;
            // In the query, where it is no more for the log than for the server.
            let query = url(&format!("/?access_token={expired}"));
            equal("in the query", shop.status("client", &query, &[])?, 401)?;
            let ambiguous = url(&format!("/a%2Fb?access_token={expired}"));
            ensure!(matches!(shop.status("client", &ambiguous, &[])?, 400 | 401), "it passes");
            let good = other(json!({}));
            let spelt = url(&format!("/%61?access_token={good}"));
            equal("spelt otherwise", shop.status("client", &spelt, &[])?, 200)?;
            shop.line(skip, &["path.normal=\"/a\"", "access_token=-"])?;
            let log = shop.log();
            ensure!(!log.contains(&expired) && !log.contains(&good), "a token is in the log");
            // Another service has no rules.
            let v2 = shop.status("client", "http://10.96.1.3:83/", &["-H", &bearer("x")])?;
            equal("another service", v2, 200)
        },
    )
}

/// Policies judge by what tokens say, and by nothing that is not proven.
pub(crate) fn claims_judge(shop: &mut Shop) -> anyhow::Result<()> {
    let signer = Signer::new(Algorithm::Es256, "k");
    let good = signer.token(&claims(&json!({})));
    let authentication = request_authentication("shop", "jwt", &at("cart", &inline(&[&signer])));
    let rules = json!([{
        "from": [{ "source": { "requestPrincipals": [format!("{ISSUER}/*")] } }],
        "when": [
            { "key": "request.auth.claims[realm][roles]", "values": ["writer"] },
            { "key": "request.auth.claims[scope]", "values": ["write"] },
            { "key": "request.auth.audiences", "values": ["shop"] },
        ],
    }, { "to": [{ "operation": { "paths": ["/open"] } }] }]);
    let allow = authorization_policy("shop", "writers", &at_service("cart", "ALLOW", &rules));
    let deny = json!([{ "from": [{ "source": { "notRequestPrincipals": ["*"] } }],
        "to": [{ "operation": { "paths": ["/members"] } }] }]);
    let deny = authorization_policy("shop", "members", &at_service("cart", "DENY", &deny));
    let ask = |shop: &Shop, path: &str, token: Option<&str>| {
        let header = token.map(bearer);
        let extra: Vec<&str> = header.iter().flat_map(|header| ["-H", header.as_str()]).collect();
        shop.status("client", &url(path), &extra)
    };
    // Without the rules nobody is anybody, whatever a token says.
    shop.with(
        &allow,
        "the policy being in force",
        |shop| Ok(ask(shop, "/", None)? == 403),
        |shop| {
            equal("not looked at", ask(shop, "/", Some(&good))?, 403)?;
            shop.with(
                &authentication,
                "the rules being in force",
                |shop| Ok(ask(shop, "/", Some("x"))? == 401),
                |shop| {
                    equal("good", ask(shop, "/", Some(&good))?, 200)?;
                    equal("none", ask(shop, "/", None)?, 403)?;
                    equal("none, elsewhere", ask(shop, "/open", None)?, 200)?;
                    for others in [
                        json!({ "realm": { "roles": ["reader"] } }),
                        json!({ "realm": { "roles": "nobody" } }),
                        json!({ "realm": null }),
                        json!({ "scope": "read writer" }),
                        json!({ "sub": null }),
                    ] {
                        let token = signer.token(&claims(&others));
                        equal(&others.to_string(), ask(shop, "/", Some(&token))?, 403)?;
                    }
                    let text = signer.token(&claims(&json!({ "realm": { "roles": "writer" } })));
                    equal("a text", ask(shop, "/", Some(&text))?, 200)
                },
            )
        },
    )?;
    shop.with(
        &deny,
        "the policy being in force",
        |shop| Ok(ask(shop, "/members", None)? == 403),
        |shop| {
            equal("another path", ask(shop, "/", None)?, 200)?;
            shop.with(
                &authentication,
                "the rules being in force",
                |shop| Ok(ask(shop, "/", Some("x"))? == 401),
                |shop| {
                    equal("a member", ask(shop, "/members", Some(&good))?, 200)?;
                    equal("nobody", ask(shop, "/members", None)?, 403)
                },
            )
        },
    )
}

/// The token stays here, its claims go on, and nobody writes them in its place.
pub(crate) fn what_the_server_sees(shop: &mut Shop) -> anyhow::Result<()> {
    let signer = Signer::new(Algorithm::EdDsa, "k");
    let token = signer.token(&claims(&json!({})));
    let mut rule = inline(&[&signer]);
    rule["fromHeaders"] = json!([{ "name": "x-token", "prefix": "jwt " }]);
    rule["fromParams"] = json!(["t"]);
    rule["fromCookies"] = json!(["session"]);
    rule["outputPayloadToHeader"] = json!("x-payload");
    rule["outputClaimToHeaders"] =
        json!([{ "header": "x-sub", "claim": "sub" }, { "header": "x-admin", "claim": "admin" }]);
    let object = |rule: &Value| request_authentication("shop", "jwt", &at("cart", rule));
    let in_force = |shop: &Shop| -> anyhow::Result<bool> {
        Ok(shop.status("client", &url("/"), &["-H", "x-token: jwt x"])? == 401)
    };
    shop.with(&object(&rule), "the rules being in force", in_force, |shop| {
        let custom = format!("x-token: jwt {token}");
        let seen =
            shop.seen("/a?b=1", &["-H", &custom, "-H", "x-sub: root", "-H", "x_sub: root"])?;
        equal("the token", header(&seen, "x-token"), None)?;
        equal("a claim", header(&seen, "x-sub"), Some("alice"))?;
        equal("its twin", header(&seen, "x_sub"), None)?;
        equal("another", header(&seen, "x-admin"), Some("true"))?;
        equal("the payload", header(&seen, "x-payload"), token.split('.').nth(1))?;
        let forged = ["-H", "x-sub: root", "-H", "x-payload: e30"];
        let seen = shop.seen("/a", &forged)?;
        equal("forged", (header(&seen, "x-sub"), header(&seen, "x-payload")), (None, None))?;
        let seen = shop.seen(&format!("/a?t={token}&b=1"), &[])?;
        equal("the query", seen["path"].as_str(), Some("/a?b=1"))?;
        equal("by the query", header(&seen, "x-sub"), Some("alice"))?;
        let cookie = format!("a=1; session={token}");
        let seen = shop.seen("/a", &["-b", &cookie])?;
        equal("the cookie", header(&seen, "cookie"), Some("a=1"))?;
        equal("by the cookie", header(&seen, "x-sub"), Some("alice"))?;
        // Not where the rule looks.
        let seen = shop.seen("/a", &["-H", &bearer("anything")])?;
        equal("elsewhere", header(&seen, "authorization"), Some("Bearer anything"))
    })?;
    rule["forwardOriginalToken"] = json!(true);
    shop.with(&object(&rule), "the rules being in force", in_force, |shop| {
        let custom = format!("x-token: jwt {token}");
        let seen = shop.seen("/a", &["-H", &custom])?;
        equal("the token", header(&seen, "x-token"), Some(&*format!("jwt {token}")))
    })
}

/// What one service's rules find good proves nothing at another, to which a route leads; and what cannot be read refuses.
pub(crate) fn nobody_else_is_trusted(shop: &mut Shop) -> anyhow::Result<()> {
    let signer = Signer::new(Algorithm::Ps256, "k");
    let token = signer.token(&claims(&json!({})));
    let wide = json!({ "jwtRules": [inline(&[&signer])] });
    let rules = json!([{ "from": [{ "source": { "requestPrincipals": ["*"] } }] }]);
    let policy = authorization_policy("shop", "members", &at_service("v2", "ALLOW", &rules));
    let backend = json!([{ "backendRefs": [{ "name": "v2", "port": 83 }] }]);
    let route = json!({ "parentRefs": [of_service("cart")], "rules": backend });
    let ask = |shop: &Shop, url: &str| shop.status("client", url, &["-H", &bearer(&token)]);
    let v2 = "http://10.96.1.3:83/";
    shop.with(
        &policy,
        "the policy being in force",
        |shop| Ok(ask(shop, v2)? == 403),
        |shop| {
            shop.with(
                &http_route("shop", "cart", &route),
                "the route being in force",
                |shop| Ok(ask(shop, &url("/"))? == 403),
                |shop| {
                    let cart =
                        request_authentication("shop", "jwt", &at("cart", &inline(&[&signer])));
                    shop.with(
                        &cart,
                        "the rules being in force",
                        |shop| Ok(with_token(shop, "x")? == 401),
                        |shop| equal("by another's rules", ask(shop, &url("/"))?, 403),
                    )?;
                    // Rules of the namespace hold at both.
                    shop.with(
                        &request_authentication("shop", "jwt", &wide),
                        "the rules being in force",
                        |shop| Ok(ask(shop, v2)? == 200),
                        |shop| equal("by common rules", ask(shop, &url("/"))?, 200),
                    )
                },
            )
        },
    )?;
    let broken = request_authentication("shop", "jwt", &at("cart", &json!({ "issuer": "" })));
    shop.with(
        &broken,
        "what cannot be read refusing",
        |shop| Ok(shop.status("client", &url("/"), &[])? == 403),
        |shop| {
            let head = shop.get("client", &url("/"), &["-i"])?.stdout.to_lowercase();
            ensure!(head.contains("culvert-reason: policy_missing"), "{head}");
            equal("another service", shop.status("client", v2, &[])?, 200)
        },
    )
}

/// A server of files in the pod of `plain/stranger`, which is outside the mesh: `GET /NAME`.
const FILES: &str = r#"
import http.server, os, ssl, sys
folder, port = sys.argv[1], int(sys.argv[2])
class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args): super().__init__(*args, directory=folder)
    def log_message(self, *_): print(self.command, self.path, flush=True)
server = http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler)
if len(sys.argv) > 3:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[3])
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"#;

struct Files {
    process: Process,
    folder: std::path::PathBuf,
}

impl Files {
    fn start(
        shop: &Shop,
        port: u16,
        certificate: Option<&std::path::Path>,
    ) -> anyhow::Result<Self> {
        let pod = shop.lab.pod("stranger");
        let folder = pod.folder().join(format!("files-{port}"));
        std::fs::create_dir_all(&folder)?;
        let mut python = pod.command("python3");
        python.args(["-c", FILES]).arg(&folder).arg(port.to_string()).args(certificate);
        let process = pod.start("files", &mut python)?;
        servers::listening(pod, port)?;
        Ok(Self { process, folder })
    }

    fn put(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let file = self.folder.join(name);
        std::fs::create_dir_all(file.parent().context("a folder")?)?;
        let next = file.with_extension("next");
        std::fs::write(&next, text)?;
        std::fs::rename(next, file).map_err(Into::into)
    }
}

/// Keys that are read from an issuer: a new key is found when a token names it, though not more often than every few seconds;
/// an issuer that is away changes nothing for what was read; before anything was, its tokens are refused.
pub(crate) fn keys_from_elsewhere(shop: &mut Shop) -> anyhow::Result<()> {
    let (first, second) = (Signer::new(Algorithm::Rs256, "1"), Signer::new(Algorithm::Es384, "2"));
    let ip = shop.lab.pod("stranger").ipv4;
    let rule =
        json!({ "issuer": ISSUER, "jwksUri": format!("http://{ip}:7200/keys"), "timeout": "2s" });
    let object = request_authentication("shop", "jwt", &at("cart", &rule));
    let (by_first, by_second) =
        (first.token(&claims(&json!({}))), second.token(&claims(&json!({}))));
    shop.with(
        &object,
        "the rules being in force",
        |shop| Ok(with_token(shop, "x")? == 401),
        |shop| {
            // Nobody is there yet.
            equal("never read", with_token(shop, &by_first)?, 503)?;
            equal("no token", shop.status("client", &url("/"), &[])?, 200)?;
            let files = Files::start(shop, 7200, None)?;
            files.put("keys", &key_set(&[&first]))?;
            until("the keys being read", PATIENCE, || {
                Ok((with_token(shop, &by_first)? == 200).then_some(()))
            })?;
            equal("not known", with_token(shop, &by_second)?, 401)?;
            // Rotated: the first request that names the new key has it read.
            files.put("keys", &key_set(&[&first, &second]))?;
            std::thread::sleep(Duration::from_secs(6));
            equal("rotated", with_token(shop, &by_second)?, 200)?;
            equal("still", with_token(shop, &by_first)?, 200)?;
            // Who names keys that nobody has does not make the waypoint ask each time.
            let before = files.process.log().matches("GET /keys").count();
            let nobody = Signer::new(Algorithm::Es256, "3").token(&claims(&json!({})));
            for _ in 0..20 {
                equal("nobody's", with_token(shop, &nobody)?, 401)?;
            }
            let asked = files.process.log().matches("GET /keys").count() - before;
            ensure!(asked <= 2, "{asked} readings for 20 tokens");
            // Garbage, and then nobody: what was read stays.
            files.put("keys", "<html>")?;
            std::thread::sleep(Duration::from_secs(6));
            equal("nobody's", with_token(shop, &nobody)?, 401)?;
            equal("garbage", with_token(shop, &by_second)?, 200)?;
            drop(files);
            std::thread::sleep(Duration::from_secs(6));
            equal("away, nobody's", with_token(shop, &nobody)?, 401)?;
            equal("away", with_token(shop, &by_second)?, 200)?;
            let failed = shop.sum("culvert_waypoint_key_reads_total", &[("outcome", "failed")])?;
            ensure!(failed >= 2.0, "{failed} failures are counted");
            let dump = shop
                .lab
                .pod("waypoint")
                .shell("curl -sf -m 5 http://127.0.0.1:15000/config_dump")?;
            let dump: Value = serde_json::from_str(&dump.output()?)?;
            equal("the dump", dump["keys"][0]["keys"].as_u64(), Some(2))?;
            ensure!(dump["keys"][0]["problem"].is_string(), "{dump}");
            Ok(())
        },
    )
}

/// An issuer that is only named says where its keys are, and proves who it is by an authority that the waypoint was given.
pub(crate) fn keys_by_discovery_over_tls(shop: &mut Shop) -> anyhow::Result<()> {
    let ip = shop.lab.pod("stranger").ipv4;
    let folder = shop.lab.pod("stranger").folder().join("tls");
    std::fs::create_dir_all(&folder)?;
    let make = |name: &str| -> anyhow::Result<(std::path::PathBuf, std::path::PathBuf)> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![ip.to_string()])?.self_signed(&key)?;
        let (both, public) =
            (folder.join(format!("{name}.pem")), folder.join(format!("{name}.crt")));
        std::fs::write(&both, format!("{}{}", key.serialize_pem(), certificate.pem()))?;
        std::fs::write(&public, certificate.pem())?;
        Ok((both, public))
    };
    let (trusted, authority) = make("trusted")?;
    let (untrusted, _) = make("untrusted")?;
    shop.waypoint("waypoint")?.stop(PATIENCE)?;
    shop.start_waypoint_with("waypoint", &["--jwks-ca", &authority.to_string_lossy()])?;
    let signer = Signer::new(Algorithm::Rs256, "k");
    let issuer = format!("https://{ip}:7201");
    let token = signer.token(&claims(&json!({ "iss": issuer })));
    let object = request_authentication("shop", "jwt", &at("cart", &json!({ "issuer": issuer })));
    let serve = |shop: &Shop, certificate: &std::path::Path| -> anyhow::Result<Files> {
        let files = Files::start(shop, 7201, Some(certificate))?;
        let said = json!({ "issuer": issuer, "jwks_uri": format!("{issuer}/keys") });
        files.put(".well-known/openid-configuration", &said.to_string())?;
        files.put("keys", &key_set(&[&signer]))?;
        Ok(files)
    };
    shop.with(
        &object,
        "the rules being in force",
        |shop| Ok(with_token(shop, "x")? == 401),
        |shop| {
            let false_issuer = serve(shop, &untrusted)?;
            let skip = shop.log().len();
            until("the false issuer being found out", PATIENCE, || {
                equal("by a false issuer", with_token(shop, &token)?, 503)?;
                Ok(shop.log().get(skip..).unwrap_or_default().contains("no TLS").then_some(()))
            })?;
            drop(false_issuer);
            let _issuer = serve(shop, &trusted)?;
            until("the keys being read", PATIENCE, || {
                Ok((with_token(shop, &token)? == 200).then_some(()))
            })
        },
    )?;
    // As before, for the trials after this one.
    shop.waypoint("waypoint")?.stop(PATIENCE)?;
    shop.start_waypoint("waypoint")
}

/// `culvert explain` judges tokens by the same rules, and objects say where they hold.
pub(crate) fn explained(shop: &mut Shop) -> anyhow::Result<()> {
    let signer = Signer::new(Algorithm::EdDsa, "k");
    let object = request_authentication("shop", "jwt", &at("cart", &inline(&[&signer])));
    let rules = json!([{ "from": [{ "source": { "requestPrincipals": ["*"] } }] }]);
    let policy = authorization_policy("shop", "members", &at_service("cart", "ALLOW", &rules));
    let ask = |shop: &Shop, token: Option<&str>| {
        let header = token.map(bearer);
        let mut arguments = vec!["explain", "shop/client", "cart.shop:83", "GET", "/"];
        arguments.extend(header.iter().flat_map(|header| ["-H", header.as_str()]));
        shop.lab.culvert(&arguments)
    };
    shop.with(
        &policy,
        "the policy being in force",
        |shop| Ok(shop.status("client", &url("/"), &[])? == 403),
        |shop| {
            shop.with(
                &object,
                "the rules being in force",
                |shop| Ok(with_token(shop, "x")? == 401),
                |shop| {
                    let good = ask(shop, Some(&signer.token(&claims(&json!({})))))?;
                    ensure!(
                        good.success()
                            && good.stdout.contains(&format!("{ISSUER}/alice"))
                            && good.stdout.contains("RequestAuthentication shop/jwt rule 0"),
                        "{}{}",
                        good.stdout,
                        good.stderr
                    );
                    let expired = signer.token(&claims(&json!({ "exp": 1 })));
                    let told = ask(shop, Some(&expired))?;
                    ensure!(
                        !told.success() && told.stdout.contains("401: the token has expired"),
                        "{}{}",
                        told.stdout,
                        told.stderr
                    );
                    let none = ask(shop, None)?;
                    ensure!(
                        !none.success() && none.stdout.contains("request principal"),
                        "{}{}",
                        none.stdout,
                        none.stderr
                    );
                    let mut curl = std::process::Command::new("curl");
                    let socket = shop.lab.controller_socket();
                    curl.args(["-sf", "--unix-socket"]).arg(socket).arg("http://c/status");
                    let status: Value = serde_json::from_str(&run(&mut curl, PATIENCE)?.output()?)?;
                    let place = &status["policies"]["RequestAuthentication shop/jwt"];
                    equal(
                        "the status",
                        place["place"].as_str(),
                        Some("the waypoint of service shop/cart"),
                    )
                },
            )
        },
    )
}
