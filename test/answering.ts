import { DeviceId, Epoch, GroupId, type KeyId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import { sealedProof, useTranscript } from '@fleetkey/protocol/transcript.ts'
import { openSealed } from '@fleetkey/protocol/wrap.ts'
import type { EnrolledDevice } from '@fleetkey/server/fleet/device.ts'
import { acknowledge } from '@fleetkey/server/flows/acknowledge.ts'
import { converge } from '@fleetkey/server/flows/converge.ts'
import type { Context } from '@fleetkey/server/flows/context.ts'
import { addMembers, createGroup } from '@fleetkey/server/flows/group.ts'
import { anEntry } from './conformance/store.ts'
import { enrolledDevice, p256 } from './enrolled-device.ts'
import { operator, testContext, type TestContext } from './harness.ts'

/** What a device does with what it is sent: all that is asked, nothing, or it cannot open it, or cannot use it. */
export type Habit = 'answers' | 'silent' | 'cannot-open' | 'cannot-use'

interface Held {
  readonly secret: Secret
  readonly nonce: Uint8Array
  readonly readOnly: boolean
  stage: 'installed' | 'active'
}

/** One device without a socket: it opens what it is sent, and answers as the agent does, as far as its habit lets it. */
export class AnsweringDevice {
  habit: Habit = 'answers'
  /** `<key>/<epoch>` */
  readonly held = new Map<string, Held>()
  readonly heard: string[] = []
  #ref: ReturnType<TestContext['bus']['connect']> | undefined
  readonly id: DeviceId
  readonly #ctx: TestContext
  readonly #recipient = p256()

  constructor(ctx: TestContext, id: DeviceId) {
    this.#ctx = ctx
    this.id = id
  }

  row(): EnrolledDevice {
    return enrolledDevice(this.id, { spki: this.#recipient.spki, at: this.#ctx.clock.now, ldevidSpki: p256().spki })
  }

  get online(): boolean {
    return this.#ref !== undefined
  }

  /** Connects and reports what it holds. */
  async connect(ctx: Context = this.#ctx): Promise<void> {
    this.#ref ??= this.#ctx.bus.connect({ client: this.id, device: this.id })
    await this.report(ctx)
  }

  disconnect(): void {
    if (this.#ref !== undefined) this.#ctx.bus.disconnect(this.#ref)
    this.#ref = undefined
    this.#ctx.bus.take(this.id)
  }

  async report(ctx: Context = this.#ctx): Promise<void> {
    const keys = [...new Set([...this.held.keys()].map((name) => name.split('/')[0] as KeyId))]
    const holdings = keys.map((key) => ({
      key,
      epochs: [...this.held].flatMap(([name, { stage }]) => (name.startsWith(`${key}/`) ? [{ epoch: Epoch.parse(Number(name.split('/')[1])), stage }] : [])),
    }))
    await converge(ctx, this.id, {
      type: 'report',
      session: new Uint8Array(16),
      sequence: 1,
      holdings,
      usage: [],
      places: [],
      resetCount: 0,
      tlsNotAfter: 1,
      trust: null,
      agent: 'test',
    })
  }

  /** Takes what was sent to it. How many messages. */
  async answer(ctx: Context = this.#ctx): Promise<number> {
    const waiting = this.#ctx.bus.take(this.id)
    for (const bytes of waiting) await this.#hear(ctx, bytes)
    return waiting.length
  }

  async #hear(ctx: Context, bytes: Uint8Array): Promise<void> {
    const { body } = readMessage(bytes, { max: 64 << 10 }).envelope
    if (body.type !== 'delivery' && body.type !== 'activate' && body.type !== 'retire') return
    this.heard.push(`${body.type} ${body.key}${body.type === 'retire' ? ` below ${body.below ?? 'all'}` : `/${body.epoch}`}`)
    if (this.habit === 'silent') return
    if (body.type === 'retire') {
      for (const name of this.held.keys())
        if (name.startsWith(`${body.key}/`) && (body.below === null || Number(name.split('/')[1]) < body.below)) this.held.delete(name)
      return await this.#say(ctx, { key: body.key, epoch: Epoch.parse(1), stage: 'retired', nonce: body.nonce, proof: null })
    }
    if (body.type === 'activate') return await this.#use(ctx, body.key, body.epoch)
    const { key, epoch, nonce, wrapped } = body
    if (this.habit === 'cannot-open') return await this.#say(ctx, { key, epoch, stage: 'failed', nonce, proof: null })
    const known = this.held.get(`${key}/${epoch}`)
    if (known === undefined) {
      const bound = { tenant: ctx.tenant, device: this.id, key, epoch, protection: 'sealed', purpose: 'key' } as const
      this.held.set(`${key}/${epoch}`, {
        secret: await openSealed(wrapped.sealed, bound, this.#recipient),
        nonce,
        readOnly: body.readOnly,
        stage: 'installed',
      })
    }
    if (body.activate) await this.#use(ctx, key, epoch)
    else await this.#say(ctx, { key, epoch, stage: 'installed', nonce, proof: null })
  }

  async #use(ctx: Context, key: KeyId, epoch: Epoch): Promise<void> {
    const own = this.held.get(`${key}/${epoch}`)
    if (own === undefined) return
    if (this.habit === 'cannot-use') return await this.#say(ctx, { key, epoch, stage: 'failed', nonce: own.nonce, proof: null })
    own.stage = 'active'
    const transcript = useTranscript({ tenant: ctx.tenant, device: this.id, key, epoch, nonce: own.nonce })
    await this.#say(ctx, { key, epoch, stage: 'active', nonce: own.nonce, proof: sealedProof(own.secret, transcript) })
  }

  async #say(ctx: Context, body: Omit<BodyOf<'acknowledge'>, 'type' | 'campaign' | 'reason'>): Promise<void> {
    await acknowledge(ctx, this.id, { type: 'acknowledge', campaign: null, reason: body.stage === 'failed' ? 'trial' : null, ...body })
  }

  /** Epochs of a key that it holds, ascending, and the one that it protects with. */
  epochs(key: string): readonly number[] {
    return [...this.held.keys()].flatMap((name) => (name.startsWith(`${key}/`) ? [Number(name.split('/')[1])] : [])).toSorted((one, other) => one - other)
  }
  current(key: string): number {
    return Math.max(
      0,
      ...[...this.held].flatMap(([name, { stage, readOnly }]) =>
        name.startsWith(`${key}/`) && stage === 'active' && !readOnly ? [Number(name.split('/')[1])] : [],
      ),
    )
  }
}

export const plant = GroupId.parse('plant')

/** Enrolled devices in one group, none of them connected. */
export const answeringFleet = async (count: number, of: { readonly onStep?: (name: string) => void } = {}) => {
  const ctx = await testContext(of)
  const devices = Array.from({ length: count }, (_, at) => new AnsweringDevice(ctx, DeviceId.parse(`gw-${String(at + 1).padStart(3, '0')}`)))
  await ctx.store.commit({ writes: devices.map((device) => ({ table: 'device', do: 'insert', row: device.row() }) as const), entries: [anEntry()] })
  await createGroup(ctx, operator(), plant)
  await addMembers(ctx, operator(), plant, { devices: devices.map(({ id }) => id) })
  return { ctx, devices }
}
