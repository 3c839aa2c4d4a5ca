//! Compiles the protobufs without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "google/rpc/status.proto",
        "envoy/discovery.proto",
        "istio/workload.proto",
        "istio/security.proto",
        "istio/ca.proto",
        "culvert/mesh.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        // Encoding must not depend on hash order: versions are hashes of it.
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .include_file("mesh_wire.rs")
        .compile_fds(descriptors)?;
    Ok(())
}
