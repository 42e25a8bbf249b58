#!/bin/sh
# Two organisations, each with its own Ray cluster: an invitation, a join, a run together, a revocation.
#
# Usage: sh examples/two_organisations.sh [FOLDER]     (WORLDLM=path of the command, PORT=of the gateway)
#
# Both run on this machine. On two machines, give the name of acme's machine in place of localhost, and open the port.
set -eu

worldlm=${WORLDLM:-worldlm}
port=${PORT:-18443}
folder=${1:-$(mktemp -d)}
mkdir -p "$folder/acme" "$folder/europe"
say() { printf '\n== %s\n' "$*"; }

# What both must have alike: the model, the budget, and how updates travel.
alike() {
    cat <<YAML
model: {hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64, context: 32}
budget: {rounds: 3}
training: {local_steps: 10, batch_size: 8}
data: {corpus: licenses}
YAML
}

{
    alike
    cat <<YAML
name: acme
gateway: {listen: "127.0.0.1:$port"}
world:
  children:
    - client: headquarters
    - {member: europe, required: true}
YAML
} > "$folder/acme/world.yaml"

{
    alike
    cat <<YAML
name: europe
joins: profile
world:
  federation: world/europe
  children:
    - client: rome
    - client: paris
YAML
} > "$folder/europe/europe.yaml"

say "acme makes the keys of its world, once"
cd "$folder/acme"
head -c 24 /dev/urandom | base64 > passphrase
chmod 600 passphrase
$worldlm gateway init acme --name localhost --port "$port" --passphrase-file passphrase

say "acme invites europe; the line goes over a safe channel"
$worldlm gateway invite world/europe > ../invitation

say "acme trains: its gateway listens, and its world waits for europe"
$worldlm train world.yaml --run-dir run > train.log 2>&1 &
acme=$!
trap 'kill $acme 2> /dev/null || true' EXIT
until curl --silent --insecure --output /dev/null "https://localhost:$port/healthz"; do
    kill -0 $acme || { cat train.log; exit 1; }
    sleep 1
done

say "europe joins, and looks whether all is well"
cd "$folder/europe"
$worldlm gateway join "$(cat ../invitation)"
$worldlm gateway check --conf europe.yaml

say "europe trains as a member"
$worldlm train europe.yaml --run-dir run 2> train.log || { cat train.log; exit 1; }
wait $acme || { cat "$folder/acme/train.log"; exit 1; }
cat "$folder/acme/train.log"

say "each looks through its run, and the other one's receipts: no update is lost, and none counts twice"
$worldlm audit "$folder/acme/run" --receipts "$folder/europe/run/receipts/sent/world/europe.jsonl"
$worldlm audit "$folder/europe/run" --receipts "$folder/acme/run/receipts/received/world/europe.jsonl"

say "acme revokes europe"
cd "$folder/acme"
$worldlm gateway revoke world/europe
$worldlm gateway members
echo "all of it lies in $folder"
