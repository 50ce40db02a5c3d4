#!/usr/bin/env bash
# Ceph's RADOS Gateway on 127.0.0.1, its objects in memory: an S3 that checks signatures and conditions.
#
#   tests/s3/rados.sh FOLDER PORT ACCESS_KEY SECRET_KEY
#
# FOLDER is empty and gets everything, the process ids in *.pid included; ending those processes ends it all. Needs the Debian packages
# radosgw, ceph-mon, ceph-osd and ceph-common. Returns when the gateway knows the user.
set -euo pipefail
folder=${1:?folder} port=${2:?port} access=${3:?access key} secret=${4:?secret key}
mkdir -p "$folder"/{mon,osd,run,log}
export CEPH_CONF=$folder/ceph.conf
monitor=127.0.0.1:$((port + 1))

cat > "$CEPH_CONF" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = $monitor
mon initial members = one
public addr = 127.0.0.1
ms bind ipv6 = false
keyring = $folder/keyring
# Every pool is one copy in one place.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
osd objectstore = memstore
memstore device bytes = 4294967296
osd class load list = *
osd class default list = *
mon data = $folder/mon
osd data = $folder/osd
rgw data = $folder/run
run dir = $folder/run
admin socket = $folder/run/\$name.asok
log file = $folder/log/\$name.log

[osd]
keyring = $folder/osd/keyring
CONF

start() {  # NAME COMMAND...: in the background, its id kept
    local name=$1
    shift
    "$@" > "$folder/log/$name.out" 2>&1 &
    echo $! > "$folder/$name.pid"
}

ceph-authtool --create-keyring "$folder/keyring" --gen-key -n mon. --cap mon 'allow *' > /dev/null
ceph-authtool "$folder/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' \
    > /dev/null
monmaptool --create --add one "$monitor" --fsid "$(sed -n 's/^fsid = //p' "$CEPH_CONF")" "$folder/monmap" > /dev/null
ceph-mon --mkfs -i one --monmap "$folder/monmap" --keyring "$folder/keyring" > "$folder/log/mon-mkfs.out" 2>&1
start mon ceph-mon -i one -f
for _ in $(seq 20); do timeout 5 ceph -s > /dev/null 2>&1 && break; sleep 0.5; done

number=$(timeout 20 ceph osd create 2> /dev/null)
timeout 20 ceph auth get-or-create "osd.$number" mon "allow profile osd" osd "allow *" -o "$folder/osd/keyring"
ceph-osd -i "$number" --mkfs > "$folder/log/osd-mkfs.out" 2>&1
start osd ceph-osd -i "$number" -f
timeout 20 ceph osd crush add "osd.$number" 1 host=here root=default > /dev/null 2>&1 || true

start gateway radosgw -n client.admin -f --rgw-frontends="beast endpoint=127.0.0.1:$port"
for _ in $(seq 60); do
    if (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
        timeout 60 radosgw-admin user create --uid=tester --display-name=tester --access-key="$access" --secret="$secret" \
            > "$folder/log/user.out" 2>&1
        exit 0
    fi
    sleep 1
done
echo "the gateway did not come up; see $folder/log" >&2
exit 1
