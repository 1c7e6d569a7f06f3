import { generateKeyPairSync, randomBytes, randomInt, sign } from 'node:crypto'
import { encode } from '@fleetkey/protocol/cbor.ts'
import { Epoch, GroupId, KeyId, TenantId } from '@fleetkey/protocol/ids.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { keyId, signMessage, type Signer } from '@fleetkey/protocol/signed.ts'
import { openWraps, wrapFor, wrapLength } from '@fleetkey/protocol/subset-difference/broadcast.ts'
import { cover } from '@fleetkey/protocol/subset-difference/cover.ts'
import { labelsOf } from '@fleetkey/protocol/subset-difference/labels.ts'
import { slots } from '@fleetkey/protocol/subset-difference/tree.ts'
import { groupAddress } from '@fleetkey/protocol/topics.ts'
import { openCell, sealCell, type Place } from '@fleetkey/server/keys/at-rest.ts'

const members = 1_000_000
const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))

/** What a new epoch without so many of a million members costs. CPU milliseconds, bytes. */
export interface Eviction {
  /** Masters opened, covers, labels and wraps of every shard; and with the messages signed. */
  readonly cpu: number
  readonly signedCpu: number
  /** Wraps with the names of their subsets, of all shards. */
  readonly bytes: number
  /** Of the wraps, what one member needs. */
  readonly each: number
  readonly wraps: number
  readonly messages: number
  /** What a message has beside its wraps, at most. */
  readonly envelope: number
}

interface Shard {
  readonly shard: number
  readonly given: number
  readonly place: Place
  readonly cell: Uint8Array
}

const median = (values: readonly number[]): number => values.toSorted((one, other) => one - other)[values.length >> 1] ?? Number.NaN
const cpuMs = async (work: () => unknown): Promise<number> => {
  const before = process.cpuUsage()
  await work()
  const { user, system } = process.cpuUsage(before)
  return (user + system) / 1000
}

/** So many members at random, by shard, ascending. */
const chosen = (count: number): ReadonlyMap<number, number[]> => {
  const all = new Set<number>()
  while (all.size < count) all.add(randomInt(members))
  const found = new Map<number, number[]>()
  for (const one of [...all].toSorted((a, b) => a - b)) found.set(Math.floor(one / slots), [...(found.get(Math.floor(one / slots)) ?? []), one % slots])
  return found
}

/** Evicts so many of 1,000,000 members in shards of 4,096, median of rounds. Throws when a member that stays does not open it, or one that was evicted does. */
export const measureEviction = async (evicted: number, rounds: number): Promise<Eviction> => {
  const dek = new Secret(random(32))
  const shards = Array.from({ length: Math.ceil(members / slots) }, (_, shard): Shard => {
    const place: Place = { tenant: 'bench', table: 'shard', row: `fleet/${shard}/1`, column: 'master' }
    return { shard, given: Math.min(slots, members - shard * slots), place, cell: sealCell(dek, place, new Secret(random(32)), random(12)) }
  })
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const signer: Signer = {
    kid: keyId(new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))),
    sign: async (tbs) => new Uint8Array(sign('sha256', tbs, { key: privateKey, dsaEncoding: 'ieee-p1363' })),
  }
  const facts = { group: GroupId.parse('fleet'), key: KeyId.parse('telemetry'), generation: 1, epoch: Epoch.parse(2), nonce: random(16) }
  const contextOf = ({ shard }: Shard) => ({ tenant: 'bench', shard, ...facts })
  const [cpus, signed]: [number[], number[]] = [[], []]
  let [bytes, envelope, wraps] = [0, 0, 0]
  for (let round = 0; round < rounds; round++) {
    const out = chosen(evicted)
    const material = new Secret(random(32))
    const made: Uint8Array[] = []
    const cpu = await cpuMs(() => {
      for (const one of shards) {
        const master = openCell(dek, one.place, one.cell)
        made.push(wrapFor(master, cover(out.get(one.shard) ?? [], one.given), material, contextOf(one)))
        master.destroy()
      }
    })
    const messages: Uint8Array[] = []
    const more = await cpuMs(async () => {
      for (const [at, own] of made.entries())
        messages.push(
          await signMessage(
            {
              v: 1,
              tenant: TenantId.parse('bench'),
              device: groupAddress(facts.group, at),
              from: 'server',
              id: random(16),
              seq: Date.now(),
              body: { type: 'broadcast', generation: 1, key: facts.key, epoch: facts.epoch, nonce: facts.nonce, activate: false, wraps: own },
            },
            signer,
          ),
        )
    })
    cpus.push(cpu)
    signed.push(cpu + more)
    bytes = made.reduce((sum, { length }) => sum + length, 0)
    wraps = bytes / (wrapLength + 4)
    envelope = Math.max(envelope, ...messages.map(({ length }, at) => length - (made[at]?.length ?? 0)))
    judge({ shards, made, out, dek, contextOf, material })
  }
  return { cpu: median(cpus), signedCpu: median(signed), bytes, each: wrapLength + 4, wraps, messages: shards.length, envelope }
}

/** The first one that stays and the first one that was evicted, in every shard that lost somebody. */
const judge = (of: {
  readonly shards: readonly Shard[]
  readonly made: readonly Uint8Array[]
  readonly out: ReadonlyMap<number, number[]>
  readonly dek: Secret
  readonly contextOf: (shard: Shard) => Parameters<typeof wrapFor>[3]
  readonly material: Secret
}): void => {
  for (const one of of.shards) {
    const gone = of.out.get(one.shard)
    if (gone === undefined) continue
    const master = openCell(of.dek, one.place, one.cell)
    const staying = Array.from({ length: one.given }, (_, slot) => slot).find((slot) => !gone.includes(slot)) ?? -1
    const opened = (slot: number) => openWraps(of.made[one.shard] ?? new Uint8Array(), labelsOf(master, slot), slot, of.contextOf(one))
    if (opened(staying)?.equals(of.material) !== true || opened(gone[0] ?? -1) !== undefined) throw new Error(`shard ${one.shard} does not evict`)
  }
}

/** The same for everybody by itself under a key of its own: CPU of a sample, for all; bytes of ciphertext, tag and a name of four bytes. */
export const measureNaive = async (): Promise<{ readonly cpu: number; readonly bytes: number }> => {
  const sample = 20_000
  const keks = Array.from({ length: sample }, () => new Secret(random(32)))
  const material = new Secret(random(32))
  const place: Place = { tenant: 'bench', table: 'kek', row: '1', column: 'wrap' }
  const iv = random(12)
  const cpu = await cpuMs(() => {
    for (const kek of keks) sealCell(kek, place, material, iv)
  })
  return { cpu: (cpu / sample) * members, bytes: members * (wrapLength + encode(members).length) }
}
