import { randomBytes } from 'node:crypto'
import { beforeAll, describe, expect, test } from 'vitest'
import { createSoftwareTpm, type SoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { openDeviceKeys, provision, type DeviceKeyBlobs, type DeviceKeys, type FirmwareKeyBlobs } from '@fleetkey/tpm2/device-keys.ts'
import { authPolicyOf, type ApprovalSet } from '@fleetkey/tpm2/firmware.ts'
import { TpmTransportError } from '@fleetkey/tpm2/errors.ts'
import { wrapForImport } from '@fleetkey/tpm2/import.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import { approver } from './approver.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const codeOf = (command: Uint8Array): number => Buffer.from(command).readUInt32BE(6)
/** Part 2, table 12. */
const unseal = 0x15e
const zgen = 0x154
const importObject = 0x156

/** Someone on the bus between agent and TPM: sees everything, and changes what `change` returns. */
const interposed = (tpm: SoftwareTpm, change: (response: Uint8Array, command: Uint8Array) => Uint8Array = (response) => response) => {
  const inner = tpm.transport()
  const wire: Uint8Array[] = []
  const transport: Transport = {
    async send(command) {
      const response = await inner.send(command)
      wire.push(command, response)
      return change(response, command)
    },
    close: inner.close,
  }
  return { transport, wire }
}

describe('somebody on the bus', () => {
  let tpm: SoftwareTpm
  let blobs: DeviceKeyBlobs
  let bound: FirmwareKeyBlobs
  let approved: ApprovalSet
  let secret: Uint8Array
  const maker = approver()
  const open = async (transport: Transport): Promise<DeviceKeys> => {
    const keys = await openDeviceKeys(new Tpm(transport, { random }), blobs)
    keys.approve([approved])
    return keys
  }
  beforeAll(async () => {
    tpm = createSoftwareTpm({ random, now: () => Date.now() })
    const client = new Tpm(tpm.transport(), { random })
    blobs = await provision(client)
    approved = await maker.running(client)
    const keys = await open(tpm.transport())
    bound = await keys.make(maker.policy())
    secret = await keys.storageKey(bound.storage)
    await keys.close()
  })

  test('does not see the storage key, nor the key of an inner wrapper', async () => {
    const { transport, wire } = interposed(tpm)
    const keys = await open(transport)
    expect(await keys.storageKey(bound.storage)).toEqual(secret)
    const wrapped = wrapForImport({ parent: keys.publics.srk, key: random(32), authPolicy: authPolicyOf(maker.policy()), random })
    await keys.importHmacKey(wrapped)
    await keys.close()
    expect(wire.map(codeOf)).toEqual(expect.arrayContaining([unseal, importObject]))
    const seen = (what: Uint8Array): boolean => wire.some((bytes) => Buffer.from(bytes).includes(what))
    expect([seen(secret), seen(wrapped.innerKey)]).toEqual([false, false])
    // What is public is seen: the search finds what is there.
    expect(seen(wrapped.public)).toBe(true)
  })

  test.each([
    ['the storage key', unseal],
    ['a shared secret', zgen],
  ])('cannot change %s: every byte of the answer counts', async (_, code) => {
    const point = Uint8Array.from(
      Buffer.from('046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c2964fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5', 'hex'),
    )
    let length = 0
    const ask = async (at: number | null): Promise<unknown> => {
      const { transport } = interposed(tpm, (response, command) => {
        if (codeOf(command) !== code) return response
        length = response.length
        return at === null ? response : response.map((byte, index) => (index === at ? byte ^ 0x10 : byte))
      })
      const keys = await open(transport)
      const asked = code === unseal ? keys.storageKey(bound.storage) : keys.zgen(bound.recipient, point)
      const outcome: unknown = await asked.catch((error: unknown) => error)
      await keys.close().catch(() => undefined)
      return outcome
    }
    expect(await ask(null)).toBeInstanceOf(Uint8Array)
    // Header and sizes are found by the parser, everything behind them by the HMAC.
    for (let at = 0; at < length; at++) expect(await ask(at), `byte ${at}`).toBeInstanceOf(Error)
    expect(await ask(length - 1)).toBeInstanceOf(TpmTransportError)
    expect(String(await ask(16))).toMatch(/HMAC does not verify/)
  })

  test('cannot answer with what the TPM said before', async () => {
    let first: Uint8Array | undefined
    const { transport } = interposed(tpm, (response, command) => {
      if (codeOf(command) !== unseal) return response
      first ??= response
      return first
    })
    const keys = await open(transport)
    expect(await keys.storageKey(bound.storage)).toEqual(secret)
    await expect(keys.storageKey(bound.storage)).rejects.toThrow(/HMAC does not verify/)
  })
})
