import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { openBoundKeys, type BoundKeys } from '@fleetkey/device-agent/bound-keys.ts'
import { openDocument, type Document } from '@fleetkey/device-agent/files.ts'
import { openKeyring } from '@fleetkey/device-agent/keyring.ts'
import { memoryFileSystem } from '@fleetkey/device-agent/memory-filesystem.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import type { ApprovalSet as KnownApprovals, BodyOf } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { sealTo } from '@fleetkey/protocol/wrap.ts'
import { reasonOf } from '@fleetkey/server/attestation/reasons.ts'
import type { DeviceKeys } from '@fleetkey/tpm2/device-keys.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { TpmError } from '@fleetkey/tpm2/errors.ts'
import { ApprovalRefused, authPolicyOf, firmwareDigest, NotApproved, type Approval } from '@fleetkey/tpm2/firmware.ts'
import { ImportRefused, wrapForImport } from '@fleetkey/tpm2/import.ts'
import { parsePublic, pointOf } from '@fleetkey/tpm2/structures.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openTransport, type Transport } from '@fleetkey/tpm2/transport.ts'
import { approver, firmwarePcrs } from './approver.ts'
import { flip, random } from './evidence.ts'
import { hasProgram } from './programs.ts'
import { startSwtpm } from './swtpm.ts'

/** What only the TPM in the device can refuse: the agent names it, and says so. */
const benches = {
  async swtpm() {
    const { spec, stop } = await startSwtpm()
    return { transport: await openTransport(spec), stop }
  },
  async simulator() {
    const tpm = createSoftwareTpm({ random, now: () => Date.now() })
    return { transport: tpm.transport(), stop: async () => undefined }
  },
} as const

describe.each(['swtpm', 'simulator'] as const)('refused by the TPM itself: %s', (which) => {
  const here = which === 'simulator' || hasProgram('swtpm')
  // oxlint-disable-next-line vitest/expect-expect, vitest/valid-title -- the titles and assertions are below
  const on = (name: string, work: () => Promise<void>): void => test.skipIf(!here)(name, work, 60_000)
  const maker = approver()
  const files = memoryFileSystem()
  const lines: string[] = []
  let transport: Transport
  let stop: () => Promise<void>
  let tpm: Tpm
  let bound: BoundKeys
  let keys: DeviceKeys
  const document = (name: string): Document => openDocument({ files, folder: '/data', name, step: () => undefined })

  const openBound = async (): Promise<void> => {
    const documents = { blobs: document('tpm-keys'), approvals: document('approvals') }
    bound = await openBoundKeys({ tpm, ...documents, step: () => undefined, log: (line) => void lines.push(line) })
    keys = bound.keys
  }

  beforeAll(async () => {
    if (!here) return
    ;({ transport, stop } = await benches[which]())
    tpm = new Tpm(transport, { random })
    await tpm.startup()
    await openBound()
  }, 60_000)
  afterAll(async () => {
    if (!here) return
    await transport.close()
    await stop()
  })

  type Blob = ReturnType<typeof wrapForImport>
  const wrapped = (parent = keys.publics.srk): Blob => wrapForImport({ parent, key: random(32), authPolicy: authPolicyOf(maker.policy()), random })
  const refusedImports: readonly (readonly [string, () => Blob])[] = [
    ['a duplicate that was altered in its integrity', () => ((of) => ({ ...of, duplicate: flip(of.duplicate, 4) }))(wrapped())],
    ['a duplicate that was altered in its key', () => ((of) => ({ ...of, duplicate: flip(of.duplicate) }))(wrapped())],
    ['a duplicate that was cut', () => ((of) => ({ ...of, duplicate: of.duplicate.subarray(0, -1) }))(wrapped())],
    ['a seed that was altered: no point of the curve', () => ((of) => ({ ...of, seed: flip(of.seed) }))(wrapped())],
    ['the seed of another delivery', () => ({ ...wrapped(), seed: wrapped().seed })],
    ['a public area that was altered: another policy', () => ((of) => ({ ...of, public: flip(of.public, 16) }))(wrapped())],
    ['the public area of another delivery', () => ({ ...wrapped(), public: wrapped().public })],
    ['the inner key of another activation', () => ({ ...wrapped(), innerKey: wrapped().innerKey })],
    ['a blob for a parent outside this TPM', () => wrapped(softwareParent())],
  ]
  /** The SRK's template around another key. */
  const softwareParent = (): Uint8Array => {
    const other = approver().policy().signer
    const { x, y } = parsePublic(other) as { x: Uint8Array; y: Uint8Array } & ReturnType<typeof parsePublic>
    const area = Uint8Array.from(keys.publics.srk)
    const own = parsePublic(area) as { x: Uint8Array; y: Uint8Array } & ReturnType<typeof parsePublic>
    area.set(x, Buffer.from(area).indexOf(own.x))
    area.set(y, Buffer.from(area).indexOf(own.y))
    return area
  }

  for (const [name, blob] of refusedImports)
    on(`case 49: key.import-refused, ${name}`, async () => {
      const refusal: unknown = await keys.importHmacKey(blob()).catch((error: unknown) => error)
      expect(refusal).toBeInstanceOf(ImportRefused)
      expect((refusal as ImportRefused).cause).toBeInstanceOf(TpmError)
      // Nothing is left behind: the genuine one goes in at once.
      expect((await keys.importHmacKey(wrapped())).private.length).toBeGreaterThan(0)
    })

  on('case 49: key.import-refused, said with the acknowledgement; an older epoch is not even shown to the TPM', async () => {
    const recipient = await bound.recipientFor(maker.policy())
    await bound.learn(known([await running()]))
    const ring = await openKeyring({
      document: document('keyring'),
      storage: new Secret(random(32)),
      tpm: {
        point: pointOf(recipient.public),
        zgen: async (point) => await keys.zgen(recipient, point),
        importHmacKey: async (of) => await keys.importHmacKey(of),
        hmac: async (key, data) => await keys.hmac(key, data),
      },
      tenant: 'plant',
      device: 'gw-1',
      random,
      step: () => undefined,
      onLoss: (why) => {
        throw new Error(why)
      },
    })
    const delivery = (epoch: number, change: (of: Blob) => Blob = (of) => of): BodyOf<'delivery'> => {
      const { innerKey, ...blob } = change(wrapped())
      const context = { tenant: 'plant', device: 'gw-1', key: 'meter', epoch, protection: 'tpm', purpose: 'inner' } as const
      const sealed = sealTo(pointOf(recipient.public), new Secret(innerKey), context)
      return {
        type: 'delivery',
        key: KeyId.parse('meter'),
        algorithm: 'HS256',
        epoch: Epoch.parse(epoch),
        campaign: null,
        nonce: random(16),
        activate: false,
        readOnly: false,
        wrapped: { protection: 'tpm', sealed, ...blob },
      }
    }
    // The reason is what the agent states of a delivery that failed (agent.ts), and what `device show` shows of the holding.
    await expect(ring.install(delivery(2, (of) => ({ ...of, duplicate: flip(of.duplicate) })))).rejects.toMatchObject({ reason: 'key.import-refused' })
    expect(ring.held()).toEqual([])
    await ring.install(delivery(2))
    await ring.use({ key: 'meter', epoch: 2, nonce: random(16), campaign: null })
    // Rollback: name and label of the blob are not asked, the floor of the keyring is.
    await expect(ring.install(delivery(1))).rejects.toMatchObject({ reason: 'epoch.lower' })
    // The blob of another epoch under this epoch's name: the label of its inner key says which one it is.
    const [older, newer] = [delivery(3), delivery(4)]
    await expect(ring.install({ ...newer, wrapped: older.wrapped })).rejects.toMatchObject({ reason: 'wrap.open' })
    expect(reasonOf('key.import-refused')?.cases).toEqual([49])
    ring.close()
  })

  const running = async (): Promise<Approval> => (await maker.running(tpm)).approvals[0] ?? Promise.reject(new Error('no approval'))
  const known = (approvals: readonly Approval[]): KnownApprovals => ({
    ...maker.policy(),
    approvals: approvals.map((one, number) => ({ ...one, pcrs: [...one.pcrs], release: `gateway/${number}`, number })),
  })
  const digest = async (pcrs: readonly number[]): Promise<Uint8Array> =>
    firmwareDigest(pcrs, await tpm.exclusive(async () => await tpm.pcrRead(alg.sha256, pcrs)))

  const refusedApprovals: readonly (readonly [string, () => Promise<Approval>])[] = [
    ['signed by another key', async () => approver().approval(await digest(firmwarePcrs))],
    ['for another policyRef, as of before a withdrawal', async () => maker.approval(await digest(firmwarePcrs), random(32))],
    ['for other PCRs', async () => ({ ...maker.approval(await digest([0, 1])), policy: await digest(firmwarePcrs) })],
    ['for the PCRs of other firmware', async () => ({ ...maker.approval(random(32)), policy: await digest(firmwarePcrs) })],
    ['whose signature was altered', async () => ((of) => ({ ...of, signature: flip(of.signature) }))(await running())],
  ]
  for (const [name, approval] of refusedApprovals)
    on(`case 53: firmware.approval-refused, an approval ${name}`, async () => {
      // What was chosen and verified holds for the boot: each row begins anew.
      await keys.close()
      await openBound()
      await bound.recipientFor(maker.policy())
      const [pair] = bound.pairs
      if (pair === undefined) throw new Error('no pair')
      keys.approve([{ ...maker.policy(), approvals: [await approval()] }])
      const refusal: unknown = await keys.storageKey(pair.storage).catch((error: unknown) => error)
      expect(refusal).toBeInstanceOf(ApprovalRefused)
      // Locked, as without any approval: whoever only asks whether it is approved hears no.
      expect(refusal).toBeInstanceOf(NotApproved)
      expect((refusal as ApprovalRefused).cause).toBeInstanceOf(TpmError)
      lines.length = 0
      expect(await bound.open(pair)).toBeUndefined()
      expect(bound.refusal).toMatch(/^the TPM refuses the approval of the firmware that runs: TPM: verifySignature: SIGNATURE/)
      expect(lines).toEqual([expect.stringMatching(/^firmware\.approval-refused: /)])
      // The genuine approval opens it.
      keys.approve([{ ...maker.policy(), approvals: [await running()] }])
      expect(await bound.open(pair)).toBeInstanceOf(Secret)
      expect(bound.refusal).toBeNull()
      expect(reasonOf('firmware.approval-refused')?.cases).toEqual([53])
    })
})
