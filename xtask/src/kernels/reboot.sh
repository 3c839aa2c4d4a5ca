# A node with enrolled pods loses its power: what happens until its agent is back.
#
# The machine is the node. `outside` is a host in no mesh, which policy refuses; so whatever reaches it
# from a pod got there past the mesh, and is counted there. The disk keeps what a node's disk keeps: the agent's and the
# controller's state, manifests, address leases, and the number of this boot.

disk=/disk
mkdir -p $disk; mount -t ext4 /dev/vda $disk
boot=$(($(cat $disk/boots) + 1)); echo $boot > $disk/boots; sync
state=$disk/state; mkdir -p $state /run/culvert /run/controller /usr/share/outside /sys/fs/bpf
mount -t bpf bpf /sys/fs/bpf
node=192.168.77.1 outside=192.168.77.200 node6=fd77::1 outside6=fd77::200
guard=$(sed -n 's/.*culvert\.guard=\([a-z]*\).*/\1/p' /proc/cmdline)
now() { read -r up rest < /proc/uptime; echo "$up"; }

# step NAME COMMAND…: one line of the table.
step() {
    title=reboot::boot_$boot::$1; shift
    started=$(now); outcome=ok
    "$@" > /tmp/output 2>&1 || outcome=FAILED
    [ $outcome = ok ] || { cat /tmp/output; tail -n 30 /run/*.log; }
    echo "@test $outcome $started $(now) $title"
}
not() { ! "$@"; }
# patiently COMMAND…: until it succeeds, for at most two minutes.
patiently() {
    tries=0
    until "$@"; do tries=$((tries + 1)); [ $tries -lt 60 ] || return 1; sleep 2; done
}

for setting in all default; do echo 0 > /proc/sys/net/ipv6/conf/$setting/accept_dad; done
# sandbox NAME: a namespace whose IPv6 addresses may be used at once.
sandbox() {
    ip netns add "$1" && ip -n "$1" link set lo up
    for setting in all default; do
        ip netns exec "$1" sysctl -q -w net.ipv6.conf.$setting.accept_dad=0
    done
}

sandbox outside
ip link add eth0 type veth peer name eth0 netns outside
ip address add $node/24 dev eth0; ip address add $node6/64 dev eth0; ip link set eth0 up
ip -n outside address add $outside/24 dev eth0; ip -n outside address add $outside6/64 dev eth0
ip -n outside link set eth0 up
ip -n outside route add 10.77.0.0/16 via $node; ip -n outside -6 route add fd77:1::/64 via $node6
echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
# What of the pods' TCP arrives outside: of the one that is in no mesh, and of all others, in whatever form. Nothing there
# speaks HBONE, so that no pod of the mesh has anything to say to it.
ip netns exec outside nft -f - << END
table inet watch {
    set strangers4 { type ipv4_addr; }
    set strangers6 { type ipv6_addr; }
    chain plain { counter; }
    chain leaked { counter; }
    chain arrived {
        type filter hook prerouting priority -300;
        ip saddr @strangers4 meta l4proto tcp goto plain
        ip6 saddr @strangers6 meta l4proto tcp goto plain
        ip saddr 10.77.0.0/16 meta l4proto tcp goto leaked
        ip6 saddr fd77:1::/64 meta l4proto tcp goto leaked
    }
}
END
arrived() {
    ip netns exec outside nft list chain inet watch "$1" | sed -n 's/.*packets \([0-9]*\).*/\1/p'
}
nothing_leaked() { count=$(arrived leaked); echo "$count packets of pods of the mesh"; [ "$count" = 0 ]; }
echo reached > /usr/share/outside/index.html
ip netns exec outside httpd -p 80 -h /usr/share/outside

reaches() { ip netns exec "$1" curl -s -g -m 5 "http://$2/" | grep -q reached; }
reaches_both() { reaches "$1" $outside && reaches "$1" "[$outside6]"; }

object() { cat > "$state/manifests/$1.json"; sync; }
# A pod stays the same one over a boot; its sandbox does not.
uid() { echo "00000000-0000-4000-8000-$(echo "$1" | md5sum | cut -c 1-12)"; }
# pod_object NAME ADDRESS…
pod_object() {
    name=$1; shift; ips=
    for address in "$@"; do ips="$ips${ips:+,}{\"ip\":\"$address\"}"; done
    object "pod-$name" << END
{"apiVersion":"v1","kind":"Pod","metadata":{"name":"$name","namespace":"shop","uid":"$(uid "$name")","labels":{"app":"$name"}},
"spec":{"nodeName":"node","serviceAccountName":"$name","containers":[{"name":"main"}]},
"status":{"phase":"Running","podIP":"${1:-}","podIPs":[$ips],"conditions":[{"type":"Ready","status":"True"}]}}
END
}

# plugin VERB TYPE POD SETTINGS: one CNI plugin, as a runtime runs it.
plugin() {
    echo "{\"cniVersion\":\"1.0.0\",\"name\":\"pods\",\"type\":\"$2\"$4}" |
        CNI_COMMAND=$1 CNI_CONTAINERID="c$boot-$3" CNI_NETNS="/run/netns/$3" CNI_IFNAME=eth0 CNI_PATH=/cni \
        CNI_ARGS="IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=$3;K8S_POD_UID=$(uid "$3")" \
        "/cni/$2"
}
BRIDGE=',"bridge":"cni0","isGateway":true,"ipam":{"type":"host-local","dataDir":"/run/leases","ranges":[[{"subnet":"10.77.1.0/24"}],[{"subnet":"fd77:1::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}'
CULVERT=',"agentSocket":"/run/culvert/agent.sock","timeoutSeconds":60'
# add_pod NAME [plain]: a sandbox and its network; what a runtime does on failure too.
add_pod() {
    [ -e "/run/netns/$1" ] || sandbox "$1"
    plugin ADD bridge "$1" "$BRIDGE" > /tmp/result || { cat /tmp/result; return 1; }
    addresses=$(sed -n 's/.*"address": *"\([0-9a-f.:]*\)\/.*/\1/p' /tmp/result)
    if [ "${2:-}" = plain ]; then
        for address in $addresses; do
            case $address in *:*) family=6;; *) family=4;; esac
            ip netns exec outside nft add element inet watch strangers$family "{ $address }"
        done
        return 0
    fi
    if ! plugin ADD culvert-cni "$1" "$CULVERT,\"prevResult\":$(cat /tmp/result)" > /tmp/answer; then
        cat /tmp/answer
        plugin DEL bridge "$1" "$BRIDGE"
        return 1
    fi
    # One word for each address.
    pod_object "$1" $addresses
}
# The error has to be one that a runtime retries (CNI: 11, try again later).
refused_for_now() { not add_pod client && grep -q '"code": *11' /tmp/answer; }

start_controller() {
    culvert-controller run --source "directory:$state/manifests" --state-dir $state/controller \
        --listen $node:15012 --san $node --admin-socket /run/controller/admin.sock --unknown-egress deny \
        > /run/controller.log 2>&1 &
    patiently culvert-controller ca root --state-dir $state/controller > /run/root.pem
}
start_agent() {
    culvert-controller token create --node node --ttl 1h --state-dir $state/controller > /run/token
    culvert-agent --node-name node --state-dir $state/agent --controller https://$node:15012 \
        --controller-root /run/root.pem --join-token-file /run/token > /run/agent.log 2>&1 &
    patiently curl -s -f -m 5 -o /dev/null http://127.0.0.1:15021/healthz/ready
}
# Both ends are the agent's own: what they counted went through a tunnel.
tunnelled() {
    curl -s -m 20 http://127.0.0.1:15020/metrics |
        grep '^istio_tcp_connections_opened_total' | grep -q 'connection_security_policy="mutual_tls"'
}
# Captured, and refused by policy.
denied() {
    not reaches client $outside && patiently grep -q "dst.addr=$outside:80 .*policy rejection" /run/agent.log &&
        not reaches client "[$outside6]" && patiently grep -q "dst.addr=\[$outside6\]:80 .*policy rejection" /run/agent.log
}
# Nobody listens where the connection is sent to.
refused() {
    for host in $outside "[$outside6]"; do
        ip netns exec client curl -s -g -m 5 "http://$host/"; [ $? = 7 ] || return 1
    done
}
in_mesh() {
    ip netns exec server httpd -p 80 -h /usr/share/outside
    reaches client "$(sed -n 's/.*"podIP":"\([0-9.]*\)".*/\1/p' "$state/manifests/pod-server.json")" &&
        reaches client "[$(sed -n 's/.*{"ip":"\([0-9a-f:]*\)"}.*/\1/p' "$state/manifests/pod-server.json")]"
}
# The machine has all that is needed, by the way that its kernel knows.
check_names_the_guard() {
    culvert check > /tmp/check; ended=$?
    cat /tmp/check
    [ $ended = 0 ] && case $guard in
        tcx) grep -q '^ok  *guard  *by tcx' /tmp/check;;
        *) grep -q '^warn  *guard  *no tcx: it falls back to clsact' /tmp/check;;
    esac
}
# lacking WHAT OPTION…: check says FAIL of it, an agent ends at once and its last words name it.
lacking() {
    what=$1; shift
    not culvert check "$@" > /tmp/check; cat /tmp/check; grep "^FAIL" /tmp/check | grep -q "$what" || return 1
    timeout 30 culvert-agent --node-name node --state-dir /tmp/half --controller https://$node:15012 \
        --controller-root /run/root.pem --join-token-file /run/token "$@" > /tmp/half.log 2>&1
    ended=$?
    cat /tmp/half.log
    [ $ended != 0 ] && [ $ended != 124 ] && tail -n 5 /tmp/half.log | grep -q "$what"
}
no_agent_runs_half_blind() {
    lacking cgroup --cgroup-root /tmp || return 1
    # What the guard of this kernel needs can be taken away; tcx is built in.
    if [ $guard = clsact ]; then
        rmmod cls_bpf; rmmod sch_ingress
        lacking clsact; failed=$?
        modprobe sch_ingress; modprobe cls_bpf
        [ $failed = 0 ] || return 1
    fi
}

if [ $boot = 1 ]; then
    mkdir -p $state/manifests $state/agent $state/controller
    echo '{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop","labels":{"culvert.dev/dataplane-mode":"ambient"}}}' | object namespace
    echo "{\"apiVersion\":\"v1\",\"kind\":\"Node\",\"metadata\":{\"name\":\"node\"},\"status\":{\"addresses\":[{\"type\":\"InternalIP\",\"address\":\"$node\"}]}}" | object node
    for pod in client server; do
        echo "{\"apiVersion\":\"v1\",\"kind\":\"ServiceAccount\",\"metadata\":{\"name\":\"$pod\",\"namespace\":\"shop\"}}" | object account-$pod
    done
    pod_object client; pod_object server
else
    step nothing_is_pinned_before_the_agent test ! -e /sys/fs/bpf/culvert
    step without_its_agent_the_node_takes_no_pod_and_says_try_again refused_for_now
    step and_its_sandbox_has_no_network not ip -n client link show eth0
    ip netns delete client
fi
step a_pod_outside_the_mesh_reaches_the_outside add_pod plain plain
step so_the_server_works reaches_both plain
step and_what_arrives_there_is_seen test "$(arrived plain)" -gt 0
step the_controller_starts start_controller
step check_names_the_guard_that_is_used check_names_the_guard
[ $boot = 2 ] || step no_agent_runs_half_blind no_agent_runs_half_blind
step nothing_leaked_before_the_agent nothing_leaked
step the_agent_starts start_agent
step a_pod_is_enrolled patiently add_pod client
step and_another patiently add_pod server
step they_talk in_mesh
step through_the_mesh patiently tunnelled
step what_policy_refuses_does_not_get_out denied
kill -9 "$(pidof culvert-agent)"
step with_the_agent_killed_connections_are_refused refused
step another_that_would_be_half_blind_does_not_start lacking cgroup --cgroup-root /tmp
step and_connections_are_refused_still refused
step nothing_leaked_at_any_time nothing_leaked
if [ $boot = 1 ]; then
    echo "@done"
    echo b > /proc/sysrq-trigger
    sleep 60
fi
