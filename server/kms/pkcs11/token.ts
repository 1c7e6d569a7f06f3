import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { ck, loadAddon, said, type Cryptoki, type Handle } from './cryptoki.ts'
import { login, type PinPlace } from './pin.ts'

export interface TokenOptions extends PinPlace {
  /** Folder of pkcs11js as `fleetkey kms install-pkcs11` makes it. */
  readonly addon: string
  /** Path of the token's library. */
  readonly module: string
  /** Label or serial number. */
  readonly token: string
  /** Operations at a time. */
  readonly sessions: number
  /** Told when the token is lost (with the reason) and when it is back (null). */
  readonly notice: (problem: Problem | null) => void
}

/** One session. An operation runs in it alone; the buffers it works on are held here, because PKCS#11 has only pointers to them. */
export interface Session {
  readonly handle: Handle
  readonly pace: Pace
  held: readonly Buffer[]
}

/** Milliseconds: a token is quick when the best of so many signatures took less; one slow signature, and it is not. */
const pace = { quick: 0.5, slow: 50, looks: 16 } as const

/** Whether the token answers so quickly that leaving the thread for it costs more than waiting. By the best of several: the others were held up by the machine. */
export class Pace {
  #isQuick = false
  #best = Infinity
  #count = 0

  get isQuick(): boolean {
    return this.#isQuick
  }

  took(milliseconds: number): void {
    this.#best = Math.min(this.#best, milliseconds)
    const isSlow = milliseconds > pace.slow
    if (++this.#count < pace.looks && !isSlow) return
    this.#isQuick = !isSlow && this.#best < pace.quick
    this.#best = Infinity
    this.#count = 0
  }
}

/** Pauses between attempts to reach a token that is lost, milliseconds: doubled up to the last. */
const pauses = { first: 50, last: 5_000 } as const
/** How long a caller waits for a token that is lost. */
const patience = 3_000

/** The token has refused an operation for what it was about. */
export class Refused extends Error {
  override readonly name = 'Refused'
}

/**
 * A token: its sessions, and what it takes to keep them. PKCS#11 is one for the whole process, so there is one Token in it. When an operation fails the token
 * counts as lost: nothing more is asked of it, and once what is under way has ended the library is started anew, logged in, and `opened` finds its keys. Callers
 * wait for that a moment, then they get Problem('unavailable', reason `kms.token`).
 */
export class Token {
  readonly cryptoki: Cryptoki
  readonly #options: TokenOptions
  readonly #opened: (session: Session, cryptoki: Cryptoki) => Promise<void>
  #slot: Handle | undefined
  #idle: Session[] = []
  /** Of all sessions, those that do something now. */
  #busy = 0
  /** Callers that wait for a session, in their order, and those that wait for the token to be back. */
  #waiting: (() => void)[] = []
  #hoping: (() => void)[] = []
  #lost: Problem | null = null
  readonly #pace = new Pace()
  #isOpening = false
  #pause: number = pauses.first
  #timer: NodeJS.Timeout | undefined
  #isClosed = false

  private constructor(options: TokenOptions, cryptoki: Cryptoki, opened: (session: Session, cryptoki: Cryptoki) => Promise<void>) {
    this.#options = options
    this.cryptoki = cryptoki
    this.#opened = opened
  }

  /** `opened` is run at each opening before anybody else has a session. Throws Problem: `kms.pkcs11`, `kms.token`, `kms.pin`, `kms.pin-file`, or what `opened` throws. */
  static async open(options: TokenOptions, opened: (session: Session, cryptoki: Cryptoki) => Promise<void>): Promise<Token> {
    const cryptoki = loadAddon(options.addon)
    try {
      cryptoki.load(options.module)
    } catch (cause) {
      throw new Problem('unavailable', `the PKCS#11 library ${options.module} does not load: ${said(cause)}`, { reason: 'kms.pkcs11', cause })
    }
    const token = new Token(options, cryptoki, opened)
    try {
      await token.#open()
    } catch (thrown) {
      token.#finalize()
      throw thrown
    }
    return token
  }

  get sessions(): number {
    return this.#options.sessions
  }

  #away(why: string, cause?: unknown): Problem {
    return new Problem('unavailable', `token ${this.#options.token}: ${why}`, { reason: 'kms.token', retryAfterSeconds: 5, cause })
  }

  #find(): Handle {
    const labels: string[] = []
    const found = this.cryptoki.C_GetSlotList(true).filter((slot) => {
      try {
        const { label, serialNumber } = this.cryptoki.C_GetTokenInfo(slot)
        const [name, serial] = [label.replaceAll('\0', ' ').trim(), serialNumber.replaceAll('\0', ' ').trim()]
        labels.push(name.slice(0, 32))
        return name === this.#options.token || serial === this.#options.token
      } catch {
        // Taken out meanwhile, or not initialized.
        return false
      }
    })
    const [slot] = found
    if (slot === undefined) throw this.#away(`it is not there (there are: ${labels.filter(Boolean).slice(0, 8).join(', ') || 'none'})`)
    if (found.length > 1) throw this.#away('more than one token has this label: name it by its serial number')
    return slot
  }

  #finalize(): void {
    try {
      this.cryptoki.C_Finalize()
    } catch {
      // It was not started, or the library is in no state to be stopped: starting it again tells.
    }
  }

  async #open(): Promise<void> {
    try {
      // Sessions are used from several threads at a time.
      this.cryptoki.C_Initialize({ flags: ck.initialize.osLocking })
      const slot = this.#find()
      const sessions = Array.from({ length: this.#options.sessions }, () => this.#session(slot))
      const [first] = sessions
      if (first === undefined) throw this.#away('no session')
      login(this.cryptoki, first.handle, slot, this.#options)
      await this.#opened(first, this.cryptoki)
      first.held = []
      this.#slot = slot
      this.#idle = sessions
    } catch (thrown) {
      throw thrown instanceof Problem ? thrown : this.#away(`it does not open: ${said(thrown)}`, thrown)
    }
  }

  /** Keys are made and destroyed in any of them: all can write. */
  #session(slot: Handle): Session {
    return { handle: this.cryptoki.C_OpenSession(slot, ck.session.serial | ck.session.rw), pace: this.#pace, held: [] }
  }

  /** Repeated once when the token was lost under it and is back soon: for work that is harmless to repeat. */
  async use<T>(work: (session: Session) => Promise<T>): Promise<T> {
    try {
      return await this.once(work)
    } catch (thrown) {
      if (!(thrown instanceof Problem) || thrown.reason !== 'kms.token') throw thrown
      if (this.#lost !== null)
        await new Promise<void>((resolve) => {
          const late = setTimeout(resolve, patience)
          this.#hoping.push(() => {
            clearTimeout(late)
            resolve()
          })
        })
      return await this.once(work)
    }
  }

  /**
   * Runs work in a session of its own. Whatever it throws, but a Problem or Refused, loses the token; the session of a Refused is replaced, because an operation
   * that failed may still be active in it.
   */
  async once<T>(work: (session: Session) => Promise<T>): Promise<T> {
    const session = await this.#take()
    this.#busy++
    try {
      const result = await work(session)
      if (this.#lost === null) this.#idle.push(session)
      return result
    } catch (thrown) {
      if (!(thrown instanceof Refused)) throw thrown instanceof Problem ? thrown : this.#lose(thrown)
      this.#replace(session)
      throw thrown
    } finally {
      session.held = []
      this.#busy--
      this.#waiting.shift()?.()
      if (this.#lost !== null) this.#reopenSoon()
    }
  }

  async #take(): Promise<Session> {
    for (;;) {
      if (this.#isClosed) throw new Problem('unavailable', 'the KMS is closed', { reason: 'kms.closed' })
      if (this.#lost !== null) throw this.#lost
      const session = this.#idle.pop()
      if (session !== undefined) return session
      await new Promise<void>((resolve) => void this.#waiting.push(resolve))
    }
  }

  #replace(session: Session): void {
    try {
      this.cryptoki.C_CloseSession(session.handle)
      if (this.#lost === null) this.#idle.push(this.#session(this.#slot as Handle))
    } catch (thrown) {
      this.#lose(thrown)
    }
  }

  #lose(thrown: unknown): Problem {
    if (this.#lost !== null) return this.#lost
    const problem = this.#away(`it is lost: ${said(thrown)}`, thrown)
    this.#lost = problem
    this.#idle = []
    this.#pause = pauses.first
    for (const one of this.#waiting.splice(0)) one()
    this.#options.notice(problem)
    return problem
  }

  /** Once nothing is under way any more: the library is not to be stopped under an operation. */
  #reopenSoon(): void {
    if (this.#busy > 0 || this.#isClosed || this.#isOpening || this.#timer !== undefined) return
    this.#timer = setTimeout(() => {
      this.#timer = undefined
      void this.#reopen()
    }, this.#pause)
    this.#pause = Math.min(this.#pause * 2, pauses.last)
  }

  async #reopen(): Promise<void> {
    if (this.#isClosed) return
    this.#isOpening = true
    this.#finalize()
    let problem: Problem | null = null
    try {
      await this.#open()
    } catch (thrown) {
      problem = toProblem(thrown)
    }
    this.#isOpening = false
    if (problem?.message !== this.#lost?.message) this.#options.notice(problem)
    this.#lost = problem
    if (problem === null) for (const one of this.#hoping.splice(0)) one()
    else this.#reopenSoon()
  }

  close(): void {
    this.#isClosed = true
    clearTimeout(this.#timer)
    for (const one of [...this.#waiting.splice(0), ...this.#hoping.splice(0)]) one()
    if (this.#busy === 0) this.#finalize()
  }
}
