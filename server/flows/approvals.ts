import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import { ApprovalSet, type FirmwarePolicy } from '@fleetkey/protocol/messages.ts'
import { firmwareRef } from '@fleetkey/protocol/transcript.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { concat, sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { authPolicyOf } from '@fleetkey/tpm2/firmware.ts'
import type { Caller } from '../access/caller.ts'
import { hasIdentity, isMeasured, type IdentifiedDevice } from '../fleet/device.ts'
import { approvable, approver, recipientPolicy, type Approvable } from '../fleet/firmware.ts'
import type { Authority } from './authority.ts'
import type { Context } from './context.ts'
import { messageTo } from './message.ts'
import { perform } from './perform.ts'
import { findAll, inChunks } from './rows.ts'
import { selection } from './selection.ts'
import { inTurn } from './turn.ts'

const system: Caller = { kind: 'system', id: 'firmware', from: 'server' }
/** Messages that are signed at a time. */
const atOnce = 32

/** What the keys of a model's devices are under now. `authPolicy`: PolicyAuthorize(Name(signer), ref). */
export interface Firmware {
  readonly generation: number
  readonly policy: FirmwarePolicy
  readonly authPolicy: Uint8Array
}

type Approvals = ApprovalSet['approvals']

export const generationId = (model: string): string => `firmware/${model}`
const approvalsId = (model: string, generation: number): string => `approvals/${model}/${generation}`

/** PCRs that approvals are over: those of every quote. */
const pcrs: readonly number[] = selection[0]?.pcrs ?? []

/** The release key as TPMs take it; it does not change while the server runs. */
const signers = new WeakMap<Authority, Uint8Array>()
const signerOf = ({ authority }: Context): Uint8Array => {
  const known = signers.get(authority) ?? approver(parseCertificate(authority.roles.release.certificate).spki)
  signers.set(authority, known)
  return known
}

/** The generation of a model's approvals: 1, and one more with every withdrawal. */
const generationOf = async (ctx: Context, model: string): Promise<number> => {
  const setting = await ctx.store.get('setting', generationId(model))
  return setting === undefined ? 1 : Number(decode(setting.value))
}

export const firmwareOf = async (ctx: Context, model: string): Promise<Firmware> => {
  const generation = await generationOf(ctx, model)
  const policy: FirmwarePolicy = { signer: signerOf(ctx), ref: firmwareRef(ctx.tenant, model, generation) }
  return { generation, policy, authPolicy: authPolicyOf(policy) }
}

/** Older generations are not looked for: so many withdrawals of one model's releases. */
const maxGenerations = 1_000

/** The generation that a device's keys work under, and that of now; `keys` null when it is none of this model and server, the whole null for keys without firmware policy. */
export const keyGenerationOf = async (ctx: Context, device: IdentifiedDevice): Promise<{ keys: number | null; current: number } | null> => {
  if (!isMeasured(device)) return null
  const { generation: current, policy } = await firmwareOf(ctx, device.model)
  const own = recipientPolicy(device.keys)
  for (let keys = current; keys > Math.max(0, current - maxGenerations); keys--)
    if (sameBytes(authPolicyOf({ ...policy, ref: firmwareRef(ctx.tenant, device.model, keys) }), own)) return { keys, current }
  return { keys: null, current }
}

const stored = async (ctx: Context, id: string): Promise<Approvals> => {
  const setting = await ctx.store.get('setting', id)
  return setting === undefined ? [] : ApprovalSet.shape.approvals.parse(decode(setting.value))
}

const same = (one: { release: string; policy: Uint8Array }, other: { release: string; policy: Uint8Array }): boolean =>
  one.release === other.release && Buffer.compare(one.policy, other.policy) === 0

interface Standing {
  readonly firmware: Firmware
  readonly id: string
  readonly held: Approvals
  readonly missing: readonly Approvable[]
  /** Whether approvals are stored that no longer hold. */
  readonly stale: boolean
}

const standingOf = async (ctx: Context, model: string): Promise<Standing> => {
  const [firmware, releases] = [await firmwareOf(ctx, model), await findAll(ctx.store, 'release', { where: { model } })]
  const id = approvalsId(model, firmware.generation)
  const wanted = approvable(releases, pcrs)
  const known = await stored(ctx, id)
  const held = known.filter((one) => wanted.some((other) => same(one, other)))
  return { firmware, id, held, missing: wanted.filter((one) => !known.some((other) => same(one, other))), stale: held.length < known.length }
}

/**
 * What is approved for a model now, signed by the release key. Signatures that are missing are made and stored; nothing is written when none is. Harmless to
 * repeat, also after a crash at any point.
 */
export const approvalsOf = async (ctx: Context, model: string): Promise<ApprovalSet> => {
  const { firmware, held, missing, stale } = await standingOf(ctx, model)
  if (missing.length === 0 && !stale) return { ...firmware.policy, approvals: held }
  return await inTurn(ctx.store, `firmware/${model}`, async () => await approve(ctx, model, await standingOf(ctx, model)))
}

const approve = async (ctx: Context, model: string, { firmware: { generation, policy }, id, held, missing }: Standing): Promise<ApprovalSet> => {
  const { release } = ctx.authority.roles
  // TPMs verify the signature over these 64 bytes. No message that the release key signs is that short: a signature of one never is an approval.
  const signed = await Promise.all(missing.map(async (one) => ({ ...one, pcrs: [...pcrs], signature: await release.sign(concat(one.policy, policy.ref)) })))
  const approvals = [...held, ...signed].toSorted((one, other) => other.number - one.number)
  const detail = `generation ${generation}: ${approvals.map((one) => one.release).join(', ') || 'nothing'}`.slice(0, 1000)
  await perform(ctx, { caller: system, action: 'firmware.approve', subject: model, detail }, async (tx) => {
    const row = await ctx.store.get('setting', id)
    const value = encode(approvals)
    if (row === undefined) tx.insert('setting', { id, value })
    else tx.update('setting', { ...row, value })
  })
  // A crash here: approved, and nobody was told; every device hears it when it connects.
  ctx.step('firmware.approved')
  return { ...policy, approvals }
}

/** Tells a connected device what firmware its keys work under. */
export const sendApprovals = async (ctx: Context, device: DeviceId, model: string): Promise<void> => {
  const set = await approvalsOf(ctx, model)
  await ctx.bus.send(device, await messageTo(ctx, ctx.authority.roles.delivery, device, { type: 'approvals', ...set }))
}

/** Devices of a model that have an identity. */
export const devicesOf = async (ctx: Context, model: string): Promise<readonly IdentifiedDevice[]> => {
  const rows = await Promise.all((['enrolled', 'quarantined'] as const).map(async (state) => await findAll(ctx.store, 'device', { where: { state } })))
  return rows.flat().filter((device): device is IdentifiedDevice => hasIdentity(device) && device.model === model)
}

/**
 * The same for every connected device of a model, and `then` more for each: a release is approved before it can be installed anywhere. The others hear it when
 * they connect.
 */
export const announceApprovals = async (ctx: Context, model: string, then: (device: DeviceId) => Promise<void> = async () => undefined): Promise<void> => {
  await approvalsOf(ctx, model)
  await inChunks(
    (await devicesOf(ctx, model)).filter((device) => isMeasured(device) && ctx.bus.online(device.id)),
    atOnce,
    async ({ id }) => {
      await sendApprovals(ctx, id, model)
      await then(id)
    },
  )
}

/** Start-up sweep: approves what a crash left imported and not approved. */
export const approveReleases = async (ctx: Context): Promise<void> => {
  const models = new Set((await findAll(ctx.store, 'release')).map(({ model }) => model))
  for (const model of models) await approvalsOf(ctx, model)
}
