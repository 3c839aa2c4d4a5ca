//! Real programs through the waypoint.

use anyhow::{Context as _, ensure};
use mesh_netns::process::run;
use mesh_netns::wait::PATIENCE;
use serde_json::Value;

use crate::shop::{CART, Shop, equal, header};

/// HTTP/1.1, HTTP/2 with prior knowledge, both to servers that speak the one and the other; many requests on one connection.
pub(crate) fn curl(shop: &mut Shop) -> anyhow::Result<()> {
    for (url, extra, version) in [
        ("http://10.96.1.1/", &[][..], "1.1"),
        ("http://10.96.1.1/", &["--http2-prior-knowledge"], "2"),
        ("http://10.96.1.1:81/", &[], "1.1"),
        ("http://10.96.1.1:82/", &[], "1.1"),
        ("http://10.96.1.1:82/", &["--http2-prior-knowledge"], "2"),
        ("http://cart.shop.svc.cluster.local/", &[], "1.1"),
    ] {
        let mut arguments = vec!["-w", "%{http_version} %{http_code}"];
        arguments.extend(extra);
        let got = shop.get("client", url, &arguments)?;
        let wanted = format!("{version} 200");
        ensure!(
            got.stdout.contains("hello from v1") && got.stdout.ends_with(&wanted),
            "{url} {extra:?}: {}{}",
            got.stdout,
            got.stderr
        );
    }
    let urls = vec!["http://10.96.1.1/"; 50];
    let mut curl = shop.lab.pod("client").command("curl");
    let got = run(curl.args(["-sS", "-m", "20"]).args(&urls), PATIENCE)?.output()?;
    equal("answers on one connection", got.matches("hello from v1").count(), 50)?;
    let counted = shop.sum(
        "istio_requests_total",
        &[
            ("reporter", "waypoint"),
            ("source_workload", "client"),
            ("destination_service", "cart.shop.svc.cluster.local"),
            ("destination_workload", "v1"),
            ("response_code", "200"),
            ("connection_security_policy", "mutual_tls"),
        ],
    )?;
    ensure!(counted >= 50.0, "{counted} requests are counted");
    let line = shop.line(0, &["request complete", "path=\"/\"", "status=200"])?;
    ensure!(line.contains("src.identity=\"spiffe://cluster.local/ns/shop/sa/client\""), "{line}");
    Ok(())
}

/// Thousands of requests, 64 at once, and dozens of streams: every one is answered, over few connections to the server.
pub(crate) fn many_at_once(shop: &mut Shop) -> anyhow::Result<()> {
    let url = format!("http://{CART}/?[1-3000]");
    let got = shop.get("client", &url, &["--parallel", "--parallel-max", "64", "-m", "60"])?;
    let answers = got.stdout.matches("hello from v1").count();
    ensure!(got.success() && answers == 3000, "{answers} answers; {}", got.stderr);
    // HTTP/2 by the lab's own client: curl 7.88 cannot use such a connection twice, with or without a mesh.
    let peer = shop.lab.bin_dir().join("culvert-lab-peer");
    let line = format!(
        "seq 64 | xargs -P 16 -I N sh -c '{} grpc {CART}:90 20 && echo answered' | sort | uniq -c",
        peer.display()
    );
    let out = shop.lab.pod("client").shell(&line)?.output()?;
    equal("streams", out.trim(), "64 answered")?;
    let kept = shop.sum("culvert_waypoint_upstream_connections", &[("kind", "http1")])?;
    ensure!(kept <= 256.0, "{kept} connections are kept");
    Ok(())
}

/// Servers that reset, are not there, or speak no HTTP: 503 with the reason, and nothing else is harmed.
pub(crate) fn misbehaving_servers(shop: &mut Shop) -> anyhow::Result<()> {
    for (port, reason) in [(94, "upstream_reset"), (95, "peer_refused"), (96, "upstream_reset")] {
        let got = shop.get("client", &format!("http://{CART}:{port}/bad"), &["-i"])?;
        let head = got.stdout.to_lowercase();
        ensure!(
            head.starts_with("http/1.1 503") && head.contains(&format!("culvert-reason: {reason}")),
            "{port}: {head}{}",
            got.stderr
        );
    }
    equal("a good one", shop.status("client", &format!("http://{CART}/"), &[])?, 200)
}

/// A bidirectional gRPC stream, trailers and all.
pub(crate) fn grpc(shop: &mut Shop) -> anyhow::Result<()> {
    shop.ask("client", &["grpc", &format!("{CART}:90"), "200"])?.output()?;
    let counted = shop.sum(
        "istio_requests_total",
        &[("request_protocol", "grpc"), ("grpc_response_status", "0")],
    )?;
    ensure!(counted >= 1.0, "no gRPC call is counted");
    Ok(())
}

/// A WebSocket, switched to and echoed over.
pub(crate) fn websocket(shop: &mut Shop) -> anyhow::Result<()> {
    shop.ask("client", &["websocket", &format!("{CART}:91"), "40"])?.output()?;
    shop.line(0, &["status=101", "path=\"/echo\""]).map(drop)
}

/// What is no HTTP: declared so, and found out; half-closes go through.
pub(crate) fn tcp(shop: &mut Shop) -> anyhow::Result<()> {
    shop.ask("client", &["client-half-close", &format!("{CART}:92")])?.output()?;
    // The server speaks first: the client's silence is waited for.
    shop.ask("client", &["server-first", &format!("{CART}:93")])?.output().map(drop)
}

/// Bodies larger than every buffer, both ways, by their checksums.
pub(crate) fn large_bodies(shop: &mut Shop) -> anyhow::Result<()> {
    let line = format!(
        "head -c 4000000 /dev/urandom > /tmp/way-body; sha256sum < /tmp/way-body | cut -c1-64; \
         curl -sS -m 60 -T /tmp/way-body -H 'content-type: x' http://{CART}:83/up \
         | python3 -c 'import json,sys,hashlib; print(hashlib.sha256(json.load(sys.stdin)[\"body\"].encode(\"latin-1\")).hexdigest())'; rm /tmp/way-body"
    );
    let out = shop.lab.pod("client").shell(&line)?.output()?;
    let sums: Vec<&str> = out.split_whitespace().collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1] && sums[0].len() == 64, "{out}");
    Ok(())
}

/// The server sees who asked, what was asked, and nothing that the client made up about itself.
pub(crate) fn what_the_server_sees(shop: &mut Shop) -> anyhow::Result<()> {
    let seen = shop.seen(
        "/a/../b/%61?x=%2e",
        &[
            "--path-as-is",
            "-H",
            "x-forwarded-client-cert: URI=spiffe://cluster.local/ns/x/sa/root",
            "-H",
            "connection: x-hop",
            "-H",
            "x-hop: 1",
        ],
    )?;
    equal("path", seen["path"].as_str(), Some("/b/a?x=%2e"))?;
    let xfcc = header(&seen, "x-forwarded-client-cert").context("no XFCC")?;
    equal(
        "XFCC",
        xfcc,
        "By=spiffe://cluster.local/ns/shop/sa/waypoint;URI=spiffe://cluster.local/ns/shop/sa/client",
    )?;
    equal("a header of the connection", header(&seen, "x-hop"), None)?;
    equal("host", header(&seen, "host"), Some("10.96.1.1:83"))?;
    let posted = shop.seen("/post", &["-d", "hello", "-H", "Expect: 100-continue"])?;
    equal("body", posted["body"].as_str(), Some("hello"))
}

/// Sends bytes as they are and gives what comes back.
const RAW: &str = "import socket, sys\n\
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)\n\
    s.sendall(sys.argv[3].encode().decode('unicode_escape').encode('latin-1'))\n\
    data = b''\n\
    try:\n\
    \x20   while True:\n\
    \x20       more = s.recv(65536)\n\
    \x20       if not more: break\n\
    \x20       data += more\n\
    except OSError: pass\n\
    print(data.decode('latin-1'))\n";

/// Requests that servers read differently are refused, or reach the server in one form only.
pub(crate) fn smuggling(shop: &mut Shop) -> anyhow::Result<()> {
    let head = "Host: cart\\r\\n";
    let end = "Connection: close\\r\\n\\r\\n";
    let refused = [
        format!(
            "POST / HTTP/1.1\\r\\n{head}Content-Length: 5\\r\\nTransfer-Encoding: chunked\\r\\n{end}0\\r\\n\\r\\n"
        ),
        format!(
            "POST / HTTP/1.1\\r\\n{head}Content-Length: 5\\r\\nContent-Length: 6\\r\\n{end}hello!"
        ),
        format!("POST / HTTP/1.1\\r\\n{head}Content-Length: +5\\r\\n{end}hello"),
        format!("POST / HTTP/1.1\\r\\n{head}Content-Length: 5, 5\\r\\n{end}hello"),
        format!("POST / HTTP/1.1\\r\\n{head}Transfer-Encoding: xchunked\\r\\n{end}0\\r\\n\\r\\n"),
        format!("POST / HTTP/1.1\\r\\n{head}Transfer-Encoding : chunked\\r\\n{end}0\\r\\n\\r\\n"),
        format!("GET / HTTP/1.1\\r\\n{head}X-A: 1\\r\\n folded\\r\\n{end}"),
        format!("GET / HTTP/1.1\\r\\n{head}X-A: 1\\rX-B: 2\\r\\n{end}"),
        format!("GET / HTTP/1.1\\n{head}{end}"),
        format!(
            "POST / HTTP/1.1\\r\\n{head}Transfer-Encoding: chunked\\r\\nContent-Length: 50\\r\\n{end}0\\r\\n\\r\\n"
        ),
        format!("GET / HTTP/1.1\\r\\nHost: a\\r\\nHost: b\\r\\n{end}"),
        format!("GET / HTTP/1.1\\r\\n{end}"),
        format!("GET /%2e%2e/%2e%2e HTTP/1.1\\r\\n{head}{end}"),
        format!("GET /a%2Fb HTTP/1.1\\r\\n{head}{end}"),
        format!("GET /a%00 HTTP/1.1\\r\\n{head}{end}"),
        format!("GET /a;b HTTP/1.1\\r\\n{head}{end}"),
        format!("GET /a%3Bb HTTP/1.1\\r\\n{head}{end}"),
        format!("GET /a%5Cb HTTP/1.1\\r\\n{head}{end}"),
        format!("GET /%c0%af HTTP/1.1\\r\\n{head}{end}"),
        format!("GET * HTTP/1.1\\r\\n{head}{end}"),
        format!("CONNECT cart:80 HTTP/1.1\\r\\n{head}{end}"),
    ];
    let raw = |text: &str| -> anyhow::Result<String> {
        let mut python = shop.lab.pod("client").command("python3");
        run(python.args(["-c", RAW, CART, "83", text]), PATIENCE)?.output()
    };
    for text in &refused {
        let answer = raw(text)?;
        let status = answer.split_whitespace().nth(1).unwrap_or_default();
        ensure!(status.starts_with('4') || answer.trim().is_empty(), "{text}: {answer}");
        ensure!(!answer.contains("\"server\""), "{text} reached the server: {answer}");
    }
    // A whole one and an ambiguous one behind it on the same connection: the first is answered, the second never arrives.
    let both = format!("GET /first HTTP/1.1\\r\\n{head}\\r\\nGET /second HTTP/1.1\\n{head}{end}");
    let answer = raw(&both)?;
    ensure!(!answer.contains("/second"), "{answer}");
    // The same whole: what is fine stays fine.
    let fine = format!(
        "POST /fine HTTP/1.1\\r\\n{head}Transfer-Encoding: chunked\\r\\n{end}5\\r\\nhello\\r\\n0\\r\\n\\r\\n"
    );
    let answer = raw(&fine)?;
    let start = answer.find('{').with_context(|| format!("{fine}: {answer}"))?;
    let seen: Value = serde_json::from_str(answer[start..].trim())?;
    equal("the path", seen["path"].as_str(), Some("/fine"))?;
    Ok(())
}

/// A cookie that HTTP/2 sends in pieces is one header for a server of HTTP/1.1.
pub(crate) fn cookies_in_pieces(shop: &mut Shop) -> anyhow::Result<()> {
    let pieces = ["--http2-prior-knowledge", "-H", "cookie: a=1", "-H", "cookie: b=2"];
    let got = shop.get("client", &format!("http://{CART}:84/cookies"), &pieces)?;
    let seen: Value = serde_json::from_str(&got.stdout)
        .with_context(|| format!("{}{}", got.stdout, got.stderr))?;
    let headers = seen["headers"].as_array().context("no headers")?;
    let cookies: Vec<_> = headers.iter().filter(|pair| pair[0] == "cookie").collect();
    ensure!(cookies.len() == 1 && cookies[0][1] == "a=1; b=2", "{cookies:?}");
    Ok(())
}

/// More requests at once than an agent allows streams in one tunnel (200): none has to wait for another's end.
pub(crate) fn more_than_a_tunnel_takes(shop: &mut Shop) -> anyhow::Result<()> {
    let url = format!("http://{CART}:83/slow?[1-280]");
    let got = shop.get(
        "client",
        &url,
        &["--parallel", "--parallel-max", "280", "--parallel-immediate", "-m", "60"],
    )?;
    let answers = got.stdout.matches("\"server\": \"v1\"").count();
    ensure!(got.success() && answers == 280, "{answers} answers; {}", got.stderr);
    // One per worker was all there was; the lab's machines have two cores.
    let tunnels = shop.sum("culvert_waypoint_upstream_connections", &[("kind", "tunnel")])?;
    ensure!(tunnels >= 3.0, "{tunnels} tunnels");
    Ok(())
}
