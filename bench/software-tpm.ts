import { createECDH, createHash, generateKeyPairSync, randomBytes, sign } from 'node:crypto'
import { createSoftwareTpm, type SoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { alg, handle } from '@fleetkey/tpm2/constants.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const now = (): number => Date.now()
const stages = 10
const quoted = [{ hash: alg.sha256, pcrs: [0, 1, 2, 3, 4, 5, 7, 11] }]

/** What a board asks of its TPM until it has answered a challenge: power, measurements, EK, AK and SRK made again, one quote. */
const boot = async (tpm: SoftwareTpm, nonce: Uint8Array): Promise<void> => {
  tpm.powerCycle()
  for (let stage = 0; stage < stages; stage++) tpm.extend(stage, nonce)
  const client = new Tpm(tpm.transport(), { random })
  for (const [hierarchy, template] of [
    [handle.endorsement, templates.ekEcc],
    [handle.owner, templates.srk],
  ] as const)
    await client.flush((await client.createPrimary(hierarchy, template)).handle)
  const ak = await client.createPrimary(handle.endorsement, templates.ak)
  await client.quote(ak, quoted, nonce)
  await client.flush(ak.handle)
}

const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })

/** The same cryptography bare: as many hashes, three public points from their scalars, one signature. */
const bare = (nonce: Uint8Array): void => {
  for (let stage = 0; stage < stages; stage++) createHash('sha256').update(nonce).update(nonce).digest()
  for (let key = 0; key < 3; key++) {
    const pair = createECDH('prime256v1')
    pair.setPrivateKey(nonce)
    pair.getPublicKey()
  }
  sign('sha256', nonce, privateKey)
}

const milliseconds = async (count: number, work: () => unknown): Promise<number> => {
  const started = performance.now()
  for (let at = 0; at < count; at++) await work()
  return (performance.now() - started) / count
}

/** Boots a second of one process, against the cryptography alone; resident memory of a booted TPM. `count`: TPMs, one boot each. */
export const measureSoftwareTpm = async (count: number): Promise<{ boot: number; floor: number; memory: number }> => {
  const nonce = new Uint8Array(32).fill(7)
  const warm = createSoftwareTpm({ random, now })
  await milliseconds(50, async () => await boot(warm, nonce))
  await milliseconds(50, () => bare(nonce))
  const before = process.memoryUsage().rss
  const tpms = Array.from({ length: count }, () => createSoftwareTpm({ random, now }))
  let next = 0
  const each = await milliseconds(count, async () => await boot(tpms[next++] as SoftwareTpm, nonce))
  const memory = (process.memoryUsage().rss - before) / count
  return { boot: each, floor: await milliseconds(count, () => bare(nonce)), memory }
}
